"""Costs of simulated steps, from a cluster file and a model's shape."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from csps.core.config import ServerConfig
from csps.core.errors import ConfigError
from csps.core.plan import Lane, Layout, StepPlan
from csps.core.strategy import STRATEGIES, Placement
from csps.sched.cost import CostModel, Sample, StepShape, fit
from csps.sched.scheduler import Scheduler
from csps.sim.cluster import AnalyticCluster, FittedLane
from csps.sim.cost_decode import DecodeCosts, DecodeMoves
from csps.sim.cost_heads import HeadsCosts
from csps.sim.cost_prefill import PrefillCosts
from csps.sim.density import density_table
from csps.sim.fabric import Fabric
from csps.sim.holdings import Holdings, Spread
from csps.sim.model import SimModel
from csps.sim.roofline import make_roofline
from csps.sim.step_cost import Demand, StepCost, StepCosts

NO_DEMAND = Demand(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class TokensCosts:
    """A `StepCosts` of KV spread by token range."""

    prefill: PrefillCosts
    decode: DecodeCosts
    holdings: Holdings

    def cost(self, plan: StepPlan, layout: Layout, shape: StepShape) -> StepCost:
        if plan.lane is Lane.PREFILL:
            return self.prefill.cost(plan, shape)
        return self.decode.cost(shape, layout, self.holdings.spread(plan))

    def released(self, seq_ids: list[int]) -> None:
        self.holdings.drop(seq_ids)


@dataclass(frozen=True, slots=True)
class FittedCosts:
    """A `StepCosts` of models fitted to live steps: the whole step counts as computing."""

    lanes: Mapping[Lane, FittedLane]
    holdings: Holdings

    def cost(self, plan: StepPlan, layout: Layout, shape: StepShape) -> StepCost:
        lane = self.lanes[plan.lane]
        if layout not in lane.models:
            raise ConfigError(f"--layout: {plan.lane} steps in layout {layout} were not measured")
        seconds = lane.models[layout].predict(shape)
        if plan.lane is Lane.DECODE:
            is_spread = self.holdings.spread(plan).trips > 0
            seconds += lane.spread_s * (is_spread and layout is Layout.SP)
        return StepCost(seconds, 0.0, 0.0, NO_DEMAND, {})

    def released(self, seq_ids: list[int]) -> None:
        self.holdings.drop(seq_ids)


def analytic_costs(
    cluster: AnalyticCluster,
    model: SimModel,
    config: ServerConfig,
    scheduler: Scheduler,
    moves: DecodeMoves,
) -> StepCosts:
    """ConfigError where the cluster cannot run the model, or csa at its gamma is unknown."""
    roofline = make_roofline(cluster, model)
    fabric = Fabric(cluster, config.sp, config.setup.tp)
    if config.setup.placement is Placement.HEADS:
        return HeadsCosts(roofline, fabric)
    ledger = scheduler.ledger
    gamma = config.attention.gamma if config.attention.is_sparse else 1.0
    prefill = PrefillCosts(roofline, fabric, ledger, config.setup.csa, density_table(gamma))
    return TokensCosts(prefill, DecodeCosts(roofline, fabric, moves), Holdings(ledger))


def layout_models(costs: StepCosts, config: ServerConfig, lane: Lane) -> Mapping[Layout, CostModel]:
    """What a server would fit at its start: linear models of the layouts of a lane that decodes.

    To costs of shapes over the range that the lane will run; fitted costs are such models.
    """
    if isinstance(costs, FittedCosts):
        return costs.lanes[lane].models
    models = {}
    for layout in STRATEGIES[config.strategy].layouts[lane]:
        samples = [Sample(s, _seconds(costs, s, layout)) for s in _shapes(config, lane)]
        models[layout] = fit(samples)
    return models


def _shapes(config: ServerConfig, lane: Lane) -> Iterator[StepShape]:
    """Decodes, chunks, and both, at short and long contexts."""
    for context in (64, 1024, 8192, 32_768):
        for decodes in (1, 4, 16, 64, 256):
            yield StepShape(decodes, decodes, 0, decodes * context)
        if lane is Lane.MIXED:
            for chunk in (64, 256, config.token_budget):
                yield StepShape(chunk, 1, chunk * context + chunk * (chunk + 1) // 2, 0)
                pairs = chunk * context + chunk * (chunk + 1) // 2
                yield StepShape(chunk + 32, 33, pairs, 32 * context)


def _seconds(costs: StepCosts, shape: StepShape, layout: Layout) -> float:
    if isinstance(costs, TokensCosts):
        sp = costs.decode.sp
        tokens = shape.num_tokens
        spread = Spread(1 / sp, -(-tokens // sp), (sp - 1) * tokens, (sp - 1) / sp)
        return costs.decode.cost(shape, layout, spread).wall_s
    assert isinstance(costs, HeadsCosts)
    return costs.of_shape(shape, layout).wall_s
