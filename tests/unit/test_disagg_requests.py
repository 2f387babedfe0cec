"""How requests enter and leave DisaggScheduler: admission, preemption, abort, ends."""

from dataclasses import replace

import pytest

from csps.core.errors import InvalidRequestError, OverloadedError
from csps.core.plan import Lane
from csps.core.request import FinishReason, SamplingParams
from csps.core.shards import Extent
from csps.sched.disagg import DisaggScheduler
from csps.sched.sequence import SequenceStatus
from tests.unit.scheduling import CONFIG, add, finish, planned, sequence, step


def scheduler_of(**changes: int) -> DisaggScheduler:
    return DisaggScheduler(replace(CONFIG, **changes))


# Admission


def test_prompt_that_never_fits_is_refused_with_both_numbers() -> None:
    scheduler = scheduler_of(pages_per_rank=4)
    with pytest.raises(InvalidRequestError, match=r"33 tokens.*holds 32"):
        scheduler.add(sequence(0, 32))
    scheduler.add(sequence(1, 31))


def test_prompt_without_room_for_output_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="prompt: 200 tokens leave no room"):
        scheduler_of().add(sequence(0, 200))


def test_queue_is_bounded_in_tokens_but_an_empty_one_takes_any_prompt() -> None:
    scheduler = scheduler_of(max_waiting_tokens=30)
    add(scheduler, 0, 40)
    with pytest.raises(OverloadedError, match=r"40 tokens are queued.*retry after 5 s"):
        scheduler.add(sequence(1, 1))
    scheduler.plan(Lane.PREFILL)
    assert scheduler.num_waiting_tokens == 0
    add(scheduler, 2, 30)


def test_watermark_is_kept_unless_nothing_else_holds_kv() -> None:
    scheduler = scheduler_of(num_ranks=1, pages_per_rank=10)
    add(scheduler, 0, 20)
    step(scheduler, Lane.PREFILL)
    waiting = add(scheduler, 1, 20)
    assert scheduler.plan(Lane.PREFILL) is None  # would leave no page free
    scheduler.abort(0)
    assert planned(scheduler.plan(Lane.PREFILL)) == [1]
    assert waiting.status is SequenceStatus.PREFILLING
    alone = scheduler_of(num_ranks=1, pages_per_rank=10)
    add(alone, 0, 39)
    assert planned(alone.plan(Lane.PREFILL)) == [0]
    assert alone.kv_usage == 1.0


def test_max_running_bounds_who_holds_kv() -> None:
    scheduler = scheduler_of(max_running=2)
    for seq_id in range(3):
        add(scheduler, seq_id, 4, max_tokens=2)
    assert planned(step(scheduler, Lane.PREFILL)) == [0, 1]
    assert scheduler.plan(Lane.PREFILL) is None
    step(scheduler, Lane.DECODE)
    assert planned(step(scheduler, Lane.PREFILL)) == [2]


# Ends


def test_last_arrival_is_preempted_and_recomputed_with_its_output() -> None:
    scheduler = scheduler_of(num_ranks=1, pages_per_rank=7, long_tokens=100)
    add(scheduler, 0, 11)
    late = add(scheduler, 1, 11, min_tokens=5)
    assert planned(step(scheduler, Lane.PREFILL)) == [0, 1]
    step(scheduler, Lane.DECODE)  # both write their third block full
    plan = scheduler.plan(Lane.DECODE)
    assert planned(plan) == [0]
    assert scheduler.released() == [1]
    assert (late.status, late.num_computed) == (SequenceStatus.WAITING, 0)
    assert scheduler.num_preemptions == 1
    add(scheduler, 2, 1)
    assert scheduler.plan(Lane.PREFILL) is None  # nothing overtakes it
    scheduler.abort(0)
    assert plan is not None
    finish(scheduler, plan)
    assert scheduler.released() == [0]
    again = scheduler.plan(Lane.PREFILL)
    assert again is not None
    work = again.work[0]
    assert (work.seq_id, work.start, [*work.token_ids]) == (1, 0, [*range(11), 7, 7])
    assert work.sampling == SamplingParams(min_tokens=3)  # 2 of the 5 are out
    assert work.new_extents == (Extent(0, 0, 4),)


def test_preempted_sequences_wait_in_order_of_arrival() -> None:
    scheduler = scheduler_of(num_ranks=1, pages_per_rank=7, long_tokens=100)
    for seq_id, num_tokens in enumerate([8, 7, 6]):
        add(scheduler, seq_id, num_tokens)
    step(scheduler, Lane.PREFILL)
    assert planned(step(scheduler, Lane.DECODE)) == [0, 1, 2]  # 0 takes the last page
    assert planned(step(scheduler, Lane.DECODE)) == [0, 1]  # 2 yields to 1
    for _ in range(3):
        assert planned(step(scheduler, Lane.DECODE)) == [0, 1]
    assert planned(step(scheduler, Lane.DECODE)) == [0]
    assert scheduler.released() == [2, 1]
    scheduler.abort(0)
    assert planned(scheduler.plan(Lane.PREFILL)) == [1, 2]


def test_alone_in_a_full_cache_ends_with_length() -> None:
    scheduler = scheduler_of(num_ranks=2, pages_per_rank=3, long_tokens=100)
    seq = add(scheduler, 0, 5)
    step(scheduler, Lane.PREFILL)
    waiting = add(scheduler, 1, 20)
    while seq.status is SequenceStatus.RUNNING:
        plan = scheduler.plan(Lane.DECODE)
        assert plan is not None
        events = finish(scheduler, plan)
    assert events[0].finish is FinishReason.LENGTH
    assert seq.num_tokens == 25  # the cache's 24, and the one drawn last
    assert scheduler.num_preemptions == 0
    assert scheduler.released() == [0]
    assert planned(scheduler.plan(Lane.PREFILL)) == [waiting.seq_id]


def test_abort_at_once_unless_a_step_holds_it() -> None:
    scheduler = scheduler_of()
    for seq_id in (0, 1):
        add(scheduler, seq_id, 4)
    plan = scheduler.plan(Lane.PREFILL)
    add(scheduler, 2, 4)
    assert scheduler.abort(2)
    assert scheduler.released() == []  # no rank ever heard of it
    assert scheduler.abort(1)
    assert not scheduler.abort(1)
    assert scheduler.released() == []
    assert plan is not None
    assert [event.seq.seq_id for event in finish(scheduler, plan)] == [0]
    assert scheduler.released() == [1]
    assert scheduler.abort(0)
    assert scheduler.released() == [0]
    assert scheduler.kv_usage == 0.0
    assert not scheduler.abort(0)


def test_context_length_ends_a_sequence() -> None:
    scheduler = scheduler_of(max_model_len=10)
    seq = add(scheduler, 0, 7, max_tokens=100)
    step(scheduler, Lane.PREFILL)
    step(scheduler, Lane.DECODE)
    plan = scheduler.plan(Lane.DECODE)
    assert plan is not None
    assert finish(scheduler, plan)[0].finish is FinishReason.LENGTH
    assert seq.num_tokens == 10
