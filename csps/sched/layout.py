"""Which layout a step gets: pure choices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from csps.core.plan import Layout, StepPlan
from csps.sched.cost import CostModel, shape_of


class Decision(NamedTuple):
    """`predicted_s`: seconds by layout, empty where nothing was predicted."""

    layout: Layout
    predicted_s: Mapping[Layout, float]


class LayoutPolicy(Protocol):
    """Chooses the layout of each step of one lane."""

    def decide(self, plan: StepPlan) -> Decision:
        """The layout of `plan`, whatever its own is."""
        ...


@dataclass(frozen=True, slots=True)
class FixedLayout:
    """Always the same."""

    layout: Layout

    def decide(self, plan: StepPlan) -> Decision:
        del plan
        return Decision(self.layout, {})


@dataclass(frozen=True, slots=True)
class TokenThreshold:
    """SP for steps of more than `num_tokens` tokens, else TP.

    Source: Shift Parallelism (arXiv 2509.16495), section 3; its threshold is a constant.
    """

    num_tokens: int

    def decide(self, plan: StepPlan) -> Decision:
        layout = Layout.SP if plan.num_tokens > self.num_tokens else Layout.TP
        return Decision(layout, {})


@dataclass(frozen=True, slots=True)
class CheapestLayout:
    """The layout whose model predicts the least time."""

    models: Mapping[Layout, CostModel]

    def decide(self, plan: StepPlan) -> Decision:
        shape = shape_of(plan)
        predicted_s = {layout: model.predict(shape) for layout, model in self.models.items()}
        return Decision(min(predicted_s, key=predicted_s.__getitem__), predicted_s)
