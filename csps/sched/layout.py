"""Which layout a step gets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from csps.core.plan import Layout
from csps.sched.cost import CostModel, StepShape

# How much of the last step's error the next prediction is corrected by, and by how much in all.
_DRIFT_RATE = 0.1
_MAX_DRIFT = 8.0


class Decision(NamedTuple):
    """`predicted_s`: seconds by layout, empty where nothing was predicted."""

    layout: Layout
    predicted_s: Mapping[Layout, float]


class LayoutPolicy(Protocol):
    """Chooses the layout of each step of one lane."""

    def decide(self, shape: StepShape) -> Decision:
        """The layout of a step of this shape."""
        ...

    def observe(self, decision: Decision, seconds: float) -> None:
        """A step that was decided so took `seconds` on its slowest rank."""
        ...


@dataclass(frozen=True, slots=True)
class FixedLayout:
    """Always the same."""

    layout: Layout

    def decide(self, shape: StepShape) -> Decision:
        del shape
        return Decision(self.layout, {})

    def observe(self, decision: Decision, seconds: float) -> None:
        """Nothing was predicted."""


@dataclass(frozen=True, slots=True)
class TokenThreshold:
    """SP for steps of more than `num_tokens` tokens, else TP.

    Source: Shift Parallelism (arXiv 2509.16495), section 3; its threshold is a constant.
    """

    num_tokens: int

    def decide(self, shape: StepShape) -> Decision:
        layout = Layout.SP if shape.num_tokens > self.num_tokens else Layout.TP
        return Decision(layout, {})

    def observe(self, decision: Decision, seconds: float) -> None:
        """Nothing was predicted."""


@dataclass(slots=True)
class CheapestLayout:
    """The layout whose model predicts the least time; every `probe_every`-th step the other one.

    Such probes measure, under the same load, what was not chosen; 0 means none.

    A machine gets slower and faster (clocks, heat, who else is on it) than when the models were
    fitted. Predictions follow it by one factor for all layouts, which never changes the choice:
    a moving average, so one odd step does not count for much.
    """

    models: Mapping[Layout, CostModel]
    probe_every: int = 0
    _drift: float = field(default=1.0, init=False)
    _num_steps: int = field(default=0, init=False)

    def decide(self, shape: StepShape) -> Decision:
        predicted_s = {
            layout: self._drift * model.predict(shape) for layout, model in self.models.items()
        }
        self._num_steps += 1
        probe = self.probe_every and self._num_steps % self.probe_every == 0
        best = max if probe else min
        return Decision(best(predicted_s, key=predicted_s.__getitem__), predicted_s)

    def observe(self, decision: Decision, seconds: float) -> None:
        ratio = seconds / decision.predicted_s[decision.layout]
        drift = self._drift * ratio**_DRIFT_RATE
        self._drift = min(max(drift, 1.0 / _MAX_DRIFT), _MAX_DRIFT)
