"""From a strategy to its scheduler, and to the layouts that its steps get without a cost model."""

from collections.abc import Mapping

from csps.core.config import ServerConfig
from csps.core.plan import Lane, Layout
from csps.core.strategy import STRATEGIES, Placement
from csps.sched.chunked import ChunkedScheduler
from csps.sched.config import SchedulerConfig
from csps.sched.disagg import DisaggScheduler
from csps.sched.layout import FixedLayout, LayoutPolicy, TokenThreshold
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
            prefix_cache=config.prefix_cache,
            max_running=config.max_running,
            max_waiting_tokens=config.max_waiting_tokens,
            max_model_len=max_model_len,
        )
    )


def given_layout(config: ServerConfig, lane: Lane) -> LayoutPolicy | None:
    """How the lane's steps get their layout; None where it takes a cost model."""
    layouts = STRATEGIES[config.strategy].layouts[lane]
    if len(layouts) == 1:
        return FixedLayout(layouts[0])
    if config.layout is not None:
        return FixedLayout(config.layout)
    if config.sp == 1:  # then both are the same
        return FixedLayout(Layout.TP)
    if config.prefill_ranks or config.decode_ranks:  # TP would give work to all ranks
        return FixedLayout(Layout.SP)
    if config.shift_threshold:
        return TokenThreshold(config.shift_threshold)
    return None
