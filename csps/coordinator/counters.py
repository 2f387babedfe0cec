"""What the lanes have done since start, for GetServerInfo."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from csps.core.plan import StepPlan, StepResult


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

    def add(self, plan: StepPlan, results: Sequence[StepResult]) -> None:
        """Account for one step that all ranks have finished."""
        self.steps += 1
        self.tokens += plan.num_tokens
        self.wall_s += max(result.stats.wall_s for result in results)
        for result in results:
            self.compute_s += result.stats.compute_s
            self.comm_s += result.stats.comm_s
            self.exposed_comm_s += result.stats.exposed_comm_s
            self.bytes_sent.update(result.stats.bytes_sent)
            self.received_by_rank[result.rank] += sum(result.stats.bytes_received.values())
