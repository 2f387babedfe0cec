"""Measures, before the first request, what steps cost in each layout.

The steps are real plans of made-up sequences. Their keys are whatever the pages hold, which
takes as long as any other; several sequences may share pages, as nothing reads what is drawn.
"""

import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from csps.core.plan import Lane, Layout, StepPlan, Work
from csps.core.request import SamplingParams
from csps.core.shards import Extent, Slice, num_blocks
from csps.rpc.fleet import Fleet
from csps.sched.cost import CostModel, Sample, fit, shape_of
from csps.sched.scheduler import Scheduler

logger = logging.getLogger(__name__)

# Above the ids of all requests, which count from 0.
FIRST_SEQ_ID = 1 << 62
REPEATS = 3
CONTEXTS = (64, 1024)  # keys before the new tokens
DECODES = (1, 4, 16, 64)  # sequences with one new token
CHUNKS = (32, 128)  # a whole budget besides


class Recipe(NamedTuple):
    """A step to measure: so many single tokens, and a chunk of so many, each after `context`."""

    num_decodes: int
    chunk_tokens: int
    context: int


def recipes(scheduler: Scheduler) -> list[Recipe]:
    """Steps within the server's limits that span what it will run."""
    config = scheduler.config
    budget = config.token_budget
    room = min(config.kv_tokens, config.max_model_len) - 1
    longest = min(config.max_running, budget)
    decodes = [n for n in DECODES if n < longest] + [longest]
    chunks = [n for n in CHUNKS if n < budget] + [budget]
    contexts = [c for c in CONTEXTS if c <= room] or [0]
    steps = [Recipe(n, 0, c) for n in decodes for c in contexts]
    steps += [Recipe(0, n, c) for n in chunks for c in contexts if n + c <= room]
    if longest < budget and budget - longest + contexts[-1] <= room:
        steps.append(Recipe(longest, budget - longest, contexts[-1]))
    return steps


async def calibrate(
    fleet: Fleet, scheduler: Scheduler, lane: Lane, layouts: Sequence[Layout]
) -> Mapping[Layout, CostModel]:
    """Fit a cost model for each layout of a lane whose KV is one shard. No request is live yet."""
    todo = recipes(scheduler)
    logger.info("measuring %d steps in %d layouts", len(todo), len(layouts))
    samples: dict[Layout, list[Sample]] = {layout: [] for layout in layouts}
    for recipe in todo:
        for layout in layouts:  # in turn, so that a slow minute slows them alike
            times = []
            for attempt in range(REPEATS):
                plan = _plan(recipe, scheduler, lane)
                results = await fleet.run(replace(plan, layout=layout))
                fleet.release([work.seq_id for work in plan.work])
                if attempt:  # the first one of a kind warms up
                    times.append(max(result.stats.wall_s for result in results))
            samples[layout].append(Sample(shape_of(plan), statistics.median(times)))
    models = {layout: fit(found) for layout, found in samples.items()}
    for layout, model in models.items():
        errors = [abs(model.predict(s.shape) / s.seconds - 1) for s in samples[layout]]
        logger.info(
            "layout %s: %s; median error %.0f%%", layout, model, 100 * statistics.median(errors)
        )
    return models


def _plan(recipe: Recipe, scheduler: Scheduler, lane: Lane) -> StepPlan:
    lengths = [1] * recipe.num_decodes + [recipe.chunk_tokens] * (recipe.chunk_tokens > 0)
    works = tuple(_works(lengths, recipe.context, scheduler.config.block_size))
    return StepPlan(lane, scheduler.take_step_id(lane), works)


def _works(lengths: Sequence[int], context: int, block_size: int) -> Iterator[Work]:
    for index, num_tokens in enumerate(lengths):
        stop = context + num_tokens
        yield Work(
            seq_id=FIRST_SEQ_ID + index,
            start=context,
            token_ids=(0,) * num_tokens,
            slices=(Slice(0, context, stop),),
            new_extents=(Extent(0, 0, num_blocks(stop, block_size)),),
            sample=True,
            sampling=SamplingParams(),
        )
