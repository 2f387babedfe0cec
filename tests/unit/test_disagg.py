"""The rules of DisaggScheduler, one by one."""

from dataclasses import replace

import pytest

from csps.core.errors import InvalidRequestError, OverloadedError
from csps.core.plan import Lane, SampledToken, StepPlan
from csps.core.request import FinishReason, SamplingParams
from csps.core.shards import Extent, Slice, num_blocks, tokens_by_rank
from csps.sched.config import SchedulerConfig
from csps.sched.disagg import DisaggScheduler
from csps.sched.placement import is_split
from csps.sched.sequence import Sequence, SequenceStatus, TokenEvent

CONFIG = SchedulerConfig(
    num_ranks=2,
    block_size=4,
    pages_per_rank=32,
    stage_tokens=32,
    long_tokens=24,
    max_running=8,
    max_waiting_tokens=1000,
    max_model_len=200,
)


def scheduler_of(**changes: int) -> DisaggScheduler:
    return DisaggScheduler(replace(CONFIG, **changes))


def sequence(seq_id: int, num_tokens: int, **sampling: int | tuple[int, ...]) -> Sequence:
    prompt = tuple(range(num_tokens))
    return Sequence(seq_id, prompt, SamplingParams(**sampling), eos_ids=frozenset({999}))


def add(scheduler: DisaggScheduler, seq_id: int, num_tokens: int, **sampling: int) -> Sequence:
    seq = sequence(seq_id, num_tokens, **sampling)
    scheduler.add(seq)
    return seq


def finish(scheduler: DisaggScheduler, plan: StepPlan, token_id: int = 7) -> list[TokenEvent]:
    sampled = {
        item.seq_id: SampledToken(item.seq_id, token_id) for item in plan.work if item.sample
    }
    events = scheduler.complete(plan, sampled)
    scheduler.check_integrity()
    return events


def step(scheduler: DisaggScheduler, lane: Lane) -> StepPlan | None:
    """One step of a lane, start to end."""
    plan = scheduler.plan(lane)
    if plan is not None:
        finish(scheduler, plan)
    return plan


def planned(plan: StepPlan | None) -> list[int]:
    return [] if plan is None else [item.seq_id for item in plan.work]


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


# Prefill lane


def test_long_prompt_goes_in_stages_over_all_ranks_beside_short_ones() -> None:
    scheduler = scheduler_of()
    add(scheduler, 0, 70)
    first = scheduler.plan(Lane.PREFILL)
    assert first is not None
    work = first.work[0]
    assert (work.start, work.stop, work.sample) == (0, 32, False)
    assert tokens_by_rank(work.slices, 2) == [16, 16]
    # All blocks of the prompt are placed and told at once.
    assert sum(extent.num_pages for extent in work.new_extents) == num_blocks(70, 4)
    assert work.sampling is not None
    add(scheduler, 1, 8)
    finish(scheduler, first)
    second = scheduler.plan(Lane.PREFILL)
    assert planned(second) == [0, 1]  # the short one waited one step, not three
    assert second is not None
    assert second.work[0].new_extents == ()
    assert second.work[0].sampling is None
    events = finish(scheduler, second)
    assert [event.seq.seq_id for event in events] == [1]
    third = scheduler.plan(Lane.PREFILL)
    assert third is not None
    assert (third.work[0].start, third.work[0].stop, third.work[0].sample) == (64, 70, True)
    finish(scheduler, third)
    assert scheduler.num_running == 2


def test_short_prompts_stay_whole_on_the_least_loaded_rank() -> None:
    scheduler = scheduler_of()
    for seq_id, num_tokens in enumerate([12, 8, 8]):
        add(scheduler, seq_id, num_tokens)
    plan = scheduler.plan(Lane.PREFILL)
    assert plan is not None
    assert [item.slices for item in plan.work] == [
        (Slice(0, 0, 12),),
        (Slice(1, 0, 8),),
        (Slice(1, 0, 8),),
    ]


def test_short_prompts_share_one_budget_in_order_of_arrival() -> None:
    scheduler = scheduler_of()
    for seq_id, num_tokens in enumerate([20, 20, 4]):
        add(scheduler, seq_id, num_tokens)
    assert planned(step(scheduler, Lane.PREFILL)) == [0]  # 2 would fit, but after 1
    assert planned(step(scheduler, Lane.PREFILL)) == [1, 2]


def test_long_prompts_share_a_step_when_their_stages_fit() -> None:
    scheduler = scheduler_of(stage_tokens=64)
    for seq_id, num_tokens in enumerate([30, 34, 24]):
        add(scheduler, seq_id, num_tokens)
    assert planned(step(scheduler, Lane.PREFILL)) == [0, 1]
    assert planned(step(scheduler, Lane.PREFILL)) == [2]


def test_a_stage_larger_than_the_budget_still_runs() -> None:
    scheduler = scheduler_of(stage_tokens=1)
    add(scheduler, 0, 30)
    add(scheduler, 1, 10)
    plan = step(scheduler, Lane.PREFILL)
    assert plan is not None
    assert [item.num_tokens for item in plan.work] == [16, 10]  # one zigzag unit; a whole prompt


def test_a_short_prompt_too_big_for_one_rank_is_split() -> None:
    scheduler = scheduler_of(pages_per_rank=4, long_tokens=100)
    assert is_split(17, scheduler.config)
    add(scheduler, 0, 20)
    plan = scheduler.plan(Lane.PREFILL)
    assert plan is not None
    assert len({piece.rank for piece in plan.work[0].slices}) == 2


def test_a_long_prompt_waiting_for_kv_is_overtaken_by_its_own_length_at_most() -> None:
    scheduler = scheduler_of(num_ranks=1, pages_per_rank=12, long_tokens=40)
    add(scheduler, 0, 16)
    step(scheduler, Lane.PREFILL)
    long = add(scheduler, 1, 40)
    started = []
    for seq_id in range(2, 14):
        add(scheduler, seq_id, 8, max_tokens=2)
        started += planned(step(scheduler, Lane.PREFILL))
        step(scheduler, Lane.DECODE)
    assert started == [2, 3, 4, 5, 6]  # 5 * 8 tokens
    assert (long.status, long.overtake_tokens) == (SequenceStatus.WAITING, 0)
    scheduler.abort(0)
    assert planned(scheduler.plan(Lane.PREFILL))[0] == 1


# Decode lane


def test_lanes_run_side_by_side_with_one_plan_each() -> None:
    scheduler = scheduler_of()
    add(scheduler, 0, 4)
    step(scheduler, Lane.PREFILL)
    add(scheduler, 1, 50)
    prefill, decode = scheduler.plan(Lane.PREFILL), scheduler.plan(Lane.DECODE)
    assert planned(prefill) == [1]
    assert planned(decode) == [0]
    assert scheduler.plan(Lane.PREFILL) is None
    assert scheduler.plan(Lane.DECODE) is None
    assert prefill is not None
    assert decode is not None
    assert (prefill.step_id, decode.step_id) == (1, 0)
    finish(scheduler, decode)
    again = scheduler.plan(Lane.DECODE)
    assert again is not None
    assert again.step_id == 1


def test_complete_refuses_a_plan_that_is_not_in_flight() -> None:
    scheduler = scheduler_of()
    add(scheduler, 0, 4)
    plan = step(scheduler, Lane.PREFILL)
    assert plan is not None
    with pytest.raises(AssertionError, match="no prefill step is in flight"):
        scheduler.complete(plan, {})


def test_the_master_owns_the_block_being_written() -> None:
    scheduler = scheduler_of()
    add(scheduler, 0, 30)
    step(scheduler, Lane.PREFILL)
    for at in range(30, 60):
        plan = scheduler.plan(Lane.DECODE)
        assert plan is not None
        (work,) = plan.work
        assert (work.start, work.num_tokens, work.sample) == (at, 1, True)
        assert bool(work.new_extents) == (at % 4 == 0)
        assert work.slices[0].rank == scheduler.ledger.last_rank(0)
        finish(scheduler, plan)


def test_a_short_sequence_stays_whole_until_it_is_long() -> None:
    scheduler = scheduler_of()
    add(scheduler, 0, 8, max_tokens=60)
    step(scheduler, Lane.PREFILL)
    while scheduler.ledger.num_blocks(0) < 6:
        assert scheduler.ledger.blocks_by_rank(0)[1] == 0
        step(scheduler, Lane.DECODE)
    for _ in range(24):
        step(scheduler, Lane.DECODE)
    assert scheduler.ledger.blocks_by_rank(0) == (6, 6)


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
    assert (work.seq_id, work.start, work.token_ids) == (1, 0, (*range(11), 7, 7))
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
