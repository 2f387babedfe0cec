"""The rules of ChunkedScheduler, one by one."""

from dataclasses import replace

import pytest

from csps.core.plan import Lane, StepPlan
from csps.core.request import FinishReason, SamplingParams
from csps.core.shards import Extent, Slice
from csps.sched.chunked import ChunkedScheduler
from csps.sched.config import SchedulerConfig
from csps.sched.sequence import SequenceStatus
from tests.unit.scheduling import add, finish, planned, step

CONFIG = SchedulerConfig(
    num_ranks=1,
    block_size=4,
    pages_per_rank=32,
    max_running=8,
    max_waiting_tokens=1000,
    max_model_len=200,
    token_budget=10,
    prefix_cache=False,  # all prompts begin alike
)


def scheduler_of(**changes: int) -> ChunkedScheduler:
    return ChunkedScheduler(replace(CONFIG, **changes))


def ranges(plan: StepPlan | None) -> list[tuple[int, int, int]]:
    """(sequence, start, stop) of a plan's work."""
    return [] if plan is None else [(item.seq_id, item.start, item.stop) for item in plan.work]


def mixed(scheduler: ChunkedScheduler) -> list[tuple[int, int, int]]:
    """One step from start to end."""
    return ranges(step(scheduler, Lane.MIXED))


def test_kv_is_one_shard() -> None:
    with pytest.raises(AssertionError, match="one shard of KV, not 2"):
        scheduler_of(num_ranks=2)
    with pytest.raises(AssertionError, match="no prefill lane"):
        scheduler_of().plan(Lane.PREFILL)


def test_a_prompt_goes_in_chunks_that_end_anywhere() -> None:
    scheduler = scheduler_of()
    add(scheduler, 0, 23)
    first = scheduler.plan(Lane.MIXED)
    assert first is not None
    assert scheduler.plan(Lane.MIXED) is None
    (work,) = first.work
    assert work.slices == (Slice(0, 0, 10),)
    assert [*work.token_ids] == [*range(10)]
    assert work.new_extents == (Extent(0, 0, 6),)  # of the whole prompt
    assert work.sampling is not None
    assert not work.sample
    assert finish(scheduler, first) == []
    assert mixed(scheduler) == [(0, 10, 20)]
    last = scheduler.plan(Lane.MIXED)
    assert last is not None
    assert ranges(last) == [(0, 20, 23)]
    assert last.work[0].sample
    assert (last.work[0].new_extents, last.work[0].sampling) == ((), None)
    assert [event.seq.seq_id for event in finish(scheduler, last)] == [0]
    assert mixed(scheduler) == [(0, 23, 24)]


def test_decodes_then_begun_prefills_then_waiting_ones() -> None:
    scheduler = scheduler_of()
    add(scheduler, 0, 5)
    assert mixed(scheduler) == [(0, 0, 5)]
    add(scheduler, 1, 12)
    assert mixed(scheduler) == [(0, 5, 6), (1, 0, 9)]
    add(scheduler, 2, 3)
    add(scheduler, 3, 8)
    assert mixed(scheduler) == [(0, 6, 7), (1, 9, 12), (2, 0, 3), (3, 0, 3)]
    assert mixed(scheduler) == [(0, 7, 8), (1, 12, 13), (2, 3, 4), (3, 3, 8)]


def test_begun_prefills_share_what_decodes_leave() -> None:
    scheduler = scheduler_of()
    for seq_id, num_tokens in enumerate([16, 9]):
        add(scheduler, seq_id, num_tokens)
    assert mixed(scheduler) == [(0, 0, 10)]
    assert mixed(scheduler) == [(0, 10, 16), (1, 0, 4)]
    assert (scheduler.num_prefilling, scheduler.num_running) == (1, 1)
    assert mixed(scheduler) == [(0, 16, 17), (1, 4, 9)]


def test_decodes_fill_the_budget_at_most_and_prefills_wait() -> None:
    scheduler = scheduler_of(token_budget=3)
    add(scheduler, 0, 2)
    add(scheduler, 1, 3, max_tokens=3)
    add(scheduler, 2, 1)
    add(scheduler, 3, 1)
    assert mixed(scheduler) == [(0, 0, 2), (1, 0, 1)]
    assert mixed(scheduler) == [(0, 2, 3), (1, 1, 3)]
    assert mixed(scheduler) == [(0, 3, 4), (1, 3, 4), (2, 0, 1)]
    assert mixed(scheduler) == [(0, 4, 5), (1, 4, 5), (2, 1, 2)]  # 1 ends
    assert mixed(scheduler) == [(0, 5, 6), (2, 2, 3), (3, 0, 1)]


def test_first_come_first_served_even_when_a_later_one_would_fit() -> None:
    scheduler = scheduler_of(pages_per_rank=10, token_budget=40)
    add(scheduler, 0, 20)
    mixed(scheduler)
    add(scheduler, 1, 20)
    add(scheduler, 2, 4)
    assert mixed(scheduler) == [(0, 20, 21)]
    scheduler.abort(0)
    assert planned(scheduler.plan(Lane.MIXED)) == [1, 2]


def test_the_whole_prompt_must_fit_above_the_watermark() -> None:
    scheduler = scheduler_of(pages_per_rank=10)
    add(scheduler, 0, 4)
    add(scheduler, 1, 33)  # 9 blocks: no page would be left
    assert mixed(scheduler) == [(0, 0, 4)]
    scheduler.abort(0)
    add(scheduler, 2, 4)
    assert mixed(scheduler) == [(1, 0, 10)]  # alone it may have everything
    assert scheduler.kv_usage == 0.9


def test_max_running_bounds_who_holds_kv() -> None:
    scheduler = scheduler_of(max_running=2)
    for seq_id in range(3):
        add(scheduler, seq_id, 2, max_tokens=2)
    assert mixed(scheduler) == [(0, 0, 2), (1, 0, 2)]
    assert mixed(scheduler) == [(0, 2, 3), (1, 2, 3)]
    assert mixed(scheduler) == [(2, 0, 2)]


def test_last_arrival_yields_its_kv_and_goes_to_the_head_of_the_queue() -> None:
    scheduler = scheduler_of(pages_per_rank=5, token_budget=20)
    add(scheduler, 0, 4, max_tokens=6)
    late = add(scheduler, 1, 7, min_tokens=4)
    add(scheduler, 2, 8)
    assert mixed(scheduler) == [(0, 0, 4), (1, 0, 7)]
    assert mixed(scheduler) == [(0, 4, 5), (1, 7, 8)]
    for at in range(5, 8):
        assert mixed(scheduler) == [(0, at, at + 1), (1, at + 3, at + 4)]
    assert scheduler.kv_usage == 1.0
    plan = scheduler.plan(Lane.MIXED)
    assert ranges(plan) == [(0, 8, 9)]
    assert scheduler.released() == [1]
    assert (late.status, late.num_computed) == (SequenceStatus.WAITING, 0)
    assert scheduler.num_preemptions == 1
    finish(scheduler, plan)
    assert scheduler.released() == [0]
    again = scheduler.plan(Lane.MIXED)
    assert ranges(again)[0] == (1, 0, 12)
    assert again is not None
    assert [*again.work[0].token_ids] == [*range(7), 7, 7, 7, 7, 7]
    assert again.work[0].sampling == SamplingParams(min_tokens=0)


def test_a_prefill_under_way_yields_to_an_older_decode() -> None:
    scheduler = scheduler_of(pages_per_rank=5, token_budget=2)
    add(scheduler, 0, 3)
    for _ in range(2):
        mixed(scheduler)
    late = add(scheduler, 1, 12)
    for at in range(3, 8):
        assert mixed(scheduler) == [(0, at, at + 1), (1, at - 3, at - 2)]
    assert mixed(scheduler) == [(0, 8, 9)]
    assert (late.status, late.num_computed) == (SequenceStatus.WAITING, 0)
    assert scheduler.released() == [1]


def test_alone_in_a_full_cache_ends_with_length() -> None:
    scheduler = scheduler_of(pages_per_rank=3)
    seq = add(scheduler, 0, 5)
    waiting = add(scheduler, 1, 8)
    while seq.status is not SequenceStatus.FINISHED:
        events = finish(scheduler, scheduler.plan(Lane.MIXED))
    assert events[0].finish is FinishReason.LENGTH
    assert seq.num_tokens == 13  # the cache's 12, and the one drawn last
    assert scheduler.num_preemptions == 0
    assert waiting.status is SequenceStatus.WAITING
    assert planned(scheduler.plan(Lane.MIXED)) == [1]


def test_abort_between_chunks_and_within_a_step() -> None:
    scheduler = scheduler_of()
    add(scheduler, 0, 15)
    add(scheduler, 1, 20)
    mixed(scheduler)
    plan = scheduler.plan(Lane.MIXED)
    assert ranges(plan) == [(0, 10, 15), (1, 0, 5)]
    assert scheduler.abort(0)
    assert scheduler.released() == []
    assert finish(scheduler, plan) == []
    assert scheduler.released() == [0]
    assert scheduler.abort(1)
    assert scheduler.released() == [1]
    assert scheduler.kv_usage == 0.0
    assert not scheduler.has_work(Lane.MIXED)
