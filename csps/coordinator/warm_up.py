"""The largest prompt steps, run once before the first request, which then does not pay for them.

What a GPU's libraries compile, load and allocate at first use is there afterwards, on every rank
and while nothing else runs beside it; and a step that does not fit fails now.
"""

import logging
import time
from collections.abc import Iterator, Sequence

from csps.coordinator.calibrate import FIRST_SEQ_ID
from csps.core.attention import DENSE, AttentionParams
from csps.core.plan import Lane, Layout, StepPlan, Work
from csps.core.request import SamplingParams
from csps.core.shards import zigzag
from csps.rpc.fleet import Fleet
from csps.sched.config import SchedulerConfig
from csps.sched.ledger import Ledger
from csps.sched.scheduler import Scheduler

logger = logging.getLogger(__name__)


async def warm_up(
    fleet: Fleet,
    scheduler: Scheduler,
    lane: Lane,
    layouts: Sequence[Layout],
    attention: AttentionParams,
) -> None:
    """One step of `lane`, that of prompts, in each of `layouts`: dense, and as `attention` has it.

    No request is live yet. What the steps write is nobody's.
    """
    begun = time.perf_counter()
    for work in _works(lane, scheduler.config, attention):
        for layout in layouts:
            plan = StepPlan(lane, scheduler.take_step_id(lane), (work,), layout)
            await fleet.run(plan)
            fleet.release([FIRST_SEQ_ID])
    logger.info("warmed up in %.1f s", time.perf_counter() - begun)


def _works(lane: Lane, config: SchedulerConfig, attention: AttentionParams) -> Iterator[Work]:
    """A prompt's first stage, as large as there is room for."""
    most = config.token_budget if lane is Lane.MIXED else config.stage_tokens
    num_tokens = min(most, config.kv_tokens, config.max_model_len - 1)
    ranks = config.ranks(lane)
    slices = tuple(
        piece._replace(rank=ranks[piece.rank])
        for piece in zigzag(0, num_tokens, len(ranks), config.block_size)
    )
    # Of the pages that the scheduler's own has: they are free.
    ledger = Ledger(config.num_ranks, config.pages_per_rank, config.block_size)
    work = Work(
        seq_id=FIRST_SEQ_ID,
        start=0,
        token_ids=(0,) * num_tokens,
        slices=slices,
        new_extents=ledger.place(FIRST_SEQ_ID, slices),
        sample=True,
        sampling=SamplingParams(),
    )
    yield work._replace(attention=DENSE)
    if attention.is_sparse:
        yield work._replace(attention=attention)
