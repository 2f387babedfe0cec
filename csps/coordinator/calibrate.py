"""Measures, before the first request, what steps cost in each layout.

The steps are real plans of made-up sequences. Their keys are whatever the pages hold, which
takes as long as any other; several sequences may share pages, as nothing reads what is drawn.
"""

import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from csps.core.plan import Lane, Layout, StepPlan, Work
from csps.core.request import SamplingParams
from csps.core.shards import Extent, Slice, num_blocks
from csps.rpc.fleet import Fleet
from csps.sched.config import SchedulerConfig
from csps.sched.cost import CostModel, Sample, fit, shape_of
from csps.sched.scheduler import Scheduler

logger = logging.getLogger(__name__)

# Above the ids of all requests, which count from 0.
FIRST_SEQ_ID = 1 << 62
REPEATS = 2  # of steps that end within a second
CONTEXTS = (64, 1024)  # keys before the new tokens
DECODES = (1, 2, 4, 8, 16, 32, 64)  # sequences with one new token; as many as may run besides
CHUNKS = (64,)  # a whole budget besides


class Recipe(NamedTuple):
    """A step to measure: so many single tokens, and a chunk of so many, each after `context`."""

    num_decodes: int
    chunk_tokens: int
    context: int


def recipes(config: SchedulerConfig, lane: Lane) -> list[Recipe]:
    """Steps within the server's limits that span what the lane will run."""
    budget = config.token_budget if lane is Lane.MIXED else config.max_running
    room = min(config.kv_tokens, config.max_model_len) - 1
    longest = min(config.max_running, budget)
    decodes = [n for n in DECODES if n < longest] + [longest]
    contexts = [c for c in CONTEXTS if c <= room] or [0]
    steps = [Recipe(n, 0, c) for n in decodes for c in contexts]
    if lane is Lane.MIXED:
        chunks = [n for n in CHUNKS if n < budget] + [budget]
        steps += [Recipe(0, n, c) for n in chunks for c in contexts if n + c <= room]
        if longest < budget and budget - longest + contexts[-1] <= room:
            steps.append(Recipe(longest, budget - longest, contexts[-1]))
    return steps


async def calibrate(
    fleet: Fleet, scheduler: Scheduler, lane: Lane, layouts: Sequence[Layout]
) -> Mapping[Layout, CostModel]:
    """Fit a cost model for each layout of a lane that decodes. No request is live yet."""
    todo = recipes(scheduler.config, lane)
    logger.info("measuring %s steps: %d kinds in %d layouts", lane, len(todo), len(layouts))
    samples: dict[Layout, list[Sample]] = {layout: [] for layout in layouts}
    for layout in layouts:
        await _measure(fleet, _plan(todo[-1], scheduler, lane), layout)  # warms up
    for recipe in todo:
        for layout in layouts:  # in turn, so that a slow minute slows them alike
            plan = _plan(recipe, scheduler, lane)
            seconds = await _measure(fleet, plan, layout)
            for _ in range(REPEATS - 1 if seconds < 1.0 else 0):
                again = await _measure(fleet, _plan(recipe, scheduler, lane), layout)
                # The least: what is above it was something else's time.
                seconds = min(seconds, again)
            samples[layout].append(Sample(shape_of(plan), seconds))
    models = {layout: fit(found) for layout, found in samples.items()}
    for layout, model in models.items():
        errors = [abs(model.predict(s.shape) / s.seconds - 1) for s in samples[layout]]
        logger.info(
            "layout %s: %s; median error %.0f%%", layout, model, 100 * statistics.median(errors)
        )
    return models


async def _measure(fleet: Fleet, plan: StepPlan, layout: Layout) -> float:
    results = await fleet.run(replace(plan, layout=layout))
    fleet.release([work.seq_id for work in plan.work])
    return max(result.stats.wall_s for result in results)


def _plan(recipe: Recipe, scheduler: Scheduler, lane: Lane) -> StepPlan:
    lengths = [1] * recipe.num_decodes + [recipe.chunk_tokens] * (recipe.chunk_tokens > 0)
    works = tuple(_works(lengths, recipe.context, scheduler.config))
    return StepPlan(lane, scheduler.take_step_id(lane), works)


def _works(lengths: Sequence[int], context: int, config: SchedulerConfig) -> Iterator[Work]:
    for index, num_tokens in enumerate(lengths):
        stop = context + num_tokens
        extents = _spread(num_blocks(stop, config.block_size), index, config.num_ranks)
        yield Work(
            seq_id=FIRST_SEQ_ID + index,
            start=context,
            token_ids=(0,) * num_tokens,
            slices=(Slice(extents[-1].rank, context, stop),),
            new_extents=extents,
            sample=True,
            sampling=SamplingParams(),
        )


def _spread(blocks: int, first_rank: int, num_ranks: int) -> tuple[Extent, ...]:
    """Evenly over all ranks; the last block, and so the new token, on each rank in turn."""
    bounds = [part * blocks // num_ranks for part in range(num_ranks + 1)]
    return tuple(
        Extent((first_rank + part) % num_ranks, 0, stop - start)
        for part, (start, stop) in enumerate(pairwise(bounds))
        if start < stop
    )
