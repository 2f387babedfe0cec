"""The layouts of a server's steps, by measured costs where it takes them."""

from collections.abc import Mapping

from csps.coordinator.calibrate import calibrate
from csps.core.config import ServerConfig
from csps.core.plan import Lane
from csps.core.strategy import STRATEGIES
from csps.rpc.fleet import Fleet
from csps.sched.layout import CheapestLayout, LayoutPolicy
from csps.sched.scheduler import Scheduler
from csps.sched.schedulers import given_layout, make_scheduler

__all__ = ["make_layouts", "make_scheduler"]


async def make_layouts(
    config: ServerConfig, fleet: Fleet, scheduler: Scheduler
) -> Mapping[Lane, LayoutPolicy]:
    """How each lane's steps get their layout; measures steps where that takes a cost model."""
    policies = {}
    for lane in scheduler.lanes:
        policy = given_layout(config, lane)
        if policy is None:
            layouts = STRATEGIES[config.strategy].layouts[lane]
            models = await calibrate(fleet, scheduler, lane, layouts)
            policy = CheapestLayout(models, config.probe_every)
        policies[lane] = policy
    return policies
