"""What the lanes have done since start, for GetServerInfo."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from csps.core.plan import Layout, StepPlan, StepResult
from csps.sched.layout import Decision


@dataclass(slots=True)
class LayoutCounters:
    """Steps that had one layout; predicted_s of those that were predicted, else 0."""

    steps: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    predicted_s: float = 0.0


@dataclass(slots=True)
class LaneCounters:
    """Sums over steps; times and bytes also over ranks, but wall_s of the slowest rank."""

    steps: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    compute_s: float = 0.0
    comm_s: float = 0.0
    exposed_comm_s: float = 0.0
    bytes_sent: Counter[str] = field(default_factory=Counter)
    received_by_rank: Counter[int] = field(default_factory=Counter)
    by_layout: dict[Layout, LayoutCounters] = field(default_factory=dict)

    def add(self, plan: StepPlan, results: Sequence[StepResult], decision: Decision) -> None:
        """Account for one step that all ranks have finished."""
        wall_s = max(result.stats.wall_s for result in results)
        self.steps += 1
        self.tokens += plan.num_tokens
        self.wall_s += wall_s
        layout = self.by_layout.setdefault(decision.layout, LayoutCounters())
        layout.steps += 1
        layout.tokens += plan.num_tokens
        layout.wall_s += wall_s
        layout.predicted_s += decision.predicted_s.get(decision.layout, 0.0)
        for result in results:
            self.compute_s += result.stats.compute_s
            self.comm_s += result.stats.comm_s
            self.exposed_comm_s += result.stats.exposed_comm_s
            self.bytes_sent.update(result.stats.bytes_sent)
            self.received_by_rank[result.rank] += sum(result.stats.bytes_received.values())
