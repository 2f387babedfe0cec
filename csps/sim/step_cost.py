"""What a simulated step costs, and who says so."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from csps.core.plan import Layout, StepPlan
from csps.sched.cost import StepShape
from csps.sim.roofline import Busy


class Demand(NamedTuple):
    """Shares of its time alone for which a step keeps a resource busy."""

    compute: float
    memory: float
    link: float


class StepCost(NamedTuple):
    """A step alone, on its slowest rank; times in seconds, bytes of all ranks of the replica.

    `exposed_comm_s`: what of `comm_s` nothing hides. `dense_bytes`: `bytes_sent` in sum, had all
    attention been exact. `density`: computed pairs / causal pairs, None where all is exact.
    """

    compute_s: float
    comm_s: float
    exposed_comm_s: float
    demand: Demand
    bytes_sent: Mapping[str, int]
    dense_bytes: int | None = None
    density: float | None = None
    recall: float | None = None

    @property
    def wall_s(self) -> float:
        return self.compute_s + self.exposed_comm_s


class StepCosts(Protocol):
    """Says what steps cost."""

    def cost(self, plan: StepPlan, layout: Layout, shape: StepShape) -> StepCost:
        """Of a step that has just been planned, in `layout`; `shape` is shape_of(plan)."""
        ...

    def released(self, seq_ids: list[int]) -> None:
        """These sequences gave their blocks back."""
        ...


def demand_of(busy: Busy, transfer_s: float, wall_s: float) -> Demand:
    """Of a step of `wall_s` alone that moves bytes for `transfer_s`."""
    if not wall_s:
        return Demand(0.0, 0.0, 0.0)
    return Demand(busy.compute_s / wall_s, busy.memory_s / wall_s, min(transfer_s / wall_s, 1.0))
