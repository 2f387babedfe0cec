"""Steps of several lanes on the same GPUs: how fast each gets on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from csps.core.plan import Lane, StepPlan
from csps.sched.cost import StepShape
from csps.sched.layout import Decision
from csps.sim.clock import Clock
from csps.sim.cluster import FittedLane
from csps.sim.step_cost import StepCost


@dataclass(slots=True, eq=False)
class RunningStep:
    """A step under way. `wait_s`: left of the overhead before its work; `left_s`: of the work,
    in seconds that it would take alone; `speed`: of the work, at most 1.
    """

    plan: StepPlan
    decision: Decision
    shape: StepShape
    cost: StepCost
    started_s: float
    wait_s: float
    left_s: float
    speed: float = 1.0

    @property
    def end_s(self) -> float:
        """Seconds until it ends at this speed."""
        return self.wait_s + self.left_s / self.speed


class Sharing(Protocol):
    """Sets the speed of steps whose work runs at the same time."""

    def share(self, working: Sequence[RunningStep]) -> None: ...


class FluidSharing:
    """Each step keeps resources busy for a share of its time; where shares of one resource add up
    to more than 1, all slow down by that factor. Below 1 nobody is slowed: real kernels do get
    into each other's way.
    """

    def share(self, working: Sequence[RunningStep]) -> None:
        if len(working) < 2:
            speed = 1.0
        else:
            speed = 1 / max(1.0, *map(sum, zip(*(s.cost.demand for s in working), strict=True)))
        for step in working:
            step.speed = speed


@dataclass(frozen=True, slots=True)
class MeasuredSharing:
    """What the steps of each lane lose beside another lane's step, as measured."""

    lanes: Mapping[Lane, FittedLane]

    def share(self, working: Sequence[RunningStep]) -> None:
        assert len(working) <= 2, "lanes were measured in pairs"
        for step in working:
            step.speed = 1.0
        if len(working) == 2:
            for step, other in zip(working, reversed(working), strict=True):
                step.speed = self._speed(step, other.shape.num_tokens)

    def _speed(self, step: RunningStep, tokens: int) -> float:
        lane, alone_s = self.lanes[step.plan.lane], step.cost.wall_s
        lost = [item.lost for item in lane.beside if item.tokens <= tokens]
        stretched_s = alone_s / (1.0 - lost[-1] if lost else 1.0)
        return alone_s / (stretched_s + lane.delay_s)


class SharedDevice:
    """The steps that one replica's GPUs are at, at most one of each lane."""

    def __init__(
        self, clock: Clock, sharing: Sharing, ended: Callable[[RunningStep], None]
    ) -> None:
        """`ended` is told of each step when it ends."""
        self.running: dict[Lane, RunningStep] = {}
        self._clock = clock
        self._sharing = sharing
        self._ended = ended
        self._since = 0.0  # when speeds were last set
        self._version = 0  # of the speeds: events of older ones are void
        self._settles = False  # a step has just ended: others may start in its place

    def start(self, step: RunningStep) -> None:
        assert step.plan.lane not in self.running, f"two {step.plan.lane} steps at a time"
        self._progress()
        self.running[step.plan.lane] = step
        if not self._settles:
            self._reschedule()

    def _progress(self) -> None:
        """Account for the time since speeds were last set."""
        passed = self._clock.now - self._since
        self._since = self._clock.now
        for step in self.running.values():
            waited = min(step.wait_s, passed)
            step.wait_s -= waited
            step.left_s -= (passed - waited) * step.speed

    def _reschedule(self) -> None:
        """Set speeds, and the next event: the first step to begin its work, or to end it."""
        self._version += 1
        steps = self.running.values()
        self._sharing.share([step for step in steps if not step.wait_s])
        for step in steps:
            # Alone, a step begins its work unnoticed: nobody's speed changes with it.
            begins = step.wait_s > 0 and len(steps) > 1
            passing = step.wait_s if begins else step.end_s
            action = self._begin if begins else self._end
            self._clock.at(self._clock.now + passing, action, step, self._version)

    def _begin(self, step: RunningStep, version: int) -> None:
        if version == self._version:
            self._progress()
            step.wait_s = 0.0
            self._reschedule()

    def _end(self, step: RunningStep, version: int) -> None:
        if version == self._version:
            self._progress()
            del self.running[step.plan.lane]
            self._settles = True
            self._ended(step)
            self._settles = False
            self._reschedule()
