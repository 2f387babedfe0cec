"""From a strategy to its scheduler and the layouts of its steps."""

from collections.abc import Mapping

from csps.coordinator.calibrate import calibrate
from csps.core.config import ServerConfig
from csps.core.plan import Lane, Layout
from csps.core.strategy import STRATEGIES, Placement
from csps.rpc.fleet import Fleet
from csps.sched.chunked import ChunkedScheduler
from csps.sched.config import SchedulerConfig
from csps.sched.disagg import DisaggScheduler
from csps.sched.layout import CheapestLayout, FixedLayout, LayoutPolicy, TokenThreshold
from csps.sched.scheduler import Scheduler

SCHEDULERS: Mapping[Placement, type[Scheduler]] = {
    Placement.TOKENS: DisaggScheduler,
    Placement.HEADS: ChunkedScheduler,
}


def make_scheduler(config: ServerConfig, max_model_len: int, num_blocks: int) -> Scheduler:
    """`num_blocks`: KV blocks that every rank can hold."""
    return SCHEDULERS[config.setup.placement](
        SchedulerConfig(
            num_ranks=config.kv_shards,
            block_size=config.setup.block_size,
            pages_per_rank=num_blocks,
            stage_tokens=config.stage_tokens,
            long_tokens=config.long_tokens,
            token_budget=config.token_budget,
            ageing=config.ageing,
            prefill_ranks=config.prefill_ranks,
            decode_ranks=config.decode_ranks,
            max_running=config.max_running,
            max_waiting_tokens=config.max_waiting_tokens,
            max_model_len=max_model_len,
        )
    )


async def make_layouts(
    config: ServerConfig, fleet: Fleet, scheduler: Scheduler
) -> Mapping[Lane, LayoutPolicy]:
    """How each lane's steps get their layout; measures steps where that takes a cost model."""
    layouts = STRATEGIES[config.strategy].layouts
    if len(layouts) == 1:
        return {lane: FixedLayout(layouts[0]) for lane in scheduler.lanes}
    if config.sp == 1:  # then both are the same
        return {lane: FixedLayout(Layout.TP) for lane in scheduler.lanes}
    if config.shift_threshold:
        return {lane: TokenThreshold(config.shift_threshold) for lane in scheduler.lanes}
    return {
        lane: CheapestLayout(await calibrate(fleet, scheduler, lane, layouts))
        for lane in scheduler.lanes
    }
