"""The rules of DisaggScheduler's two lanes, one by one."""

from dataclasses import replace

import pytest

from csps.core.plan import Lane
from csps.core.shards import Slice, num_blocks, tokens_by_rank
from csps.sched.disagg import DisaggScheduler
from csps.sched.placement import is_split
from tests.unit.scheduling import CONFIG, add, finish, planned, step


def scheduler_of(**changes: int) -> DisaggScheduler:
    return DisaggScheduler(replace(CONFIG, **changes))


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
    assert planned(second) == [1, 0]  # the short one waited one step, not three
    assert second is not None
    assert second.work[1].new_extents == ()
    assert second.work[1].sampling is None
    events = finish(scheduler, second)
    assert [event.seq.seq_id for event in events] == [1]
    third = scheduler.plan(Lane.PREFILL)
    assert third is not None
    assert (third.work[0].start, third.work[0].stop, third.work[0].sample) == (64, 70, True)
    finish(scheduler, third)
    assert scheduler.num_running == 2


def test_short_prompts_stay_whole_on_the_least_loaded_rank() -> None:
    scheduler = scheduler_of()
    for seq_id, num_tokens in enumerate([5, 4, 8, 9]):
        add(scheduler, seq_id, num_tokens)
    plan = scheduler.plan(Lane.PREFILL)
    assert plan is not None
    assert [(item.seq_id, item.slices) for item in plan.work] == [
        (1, (Slice(0, 0, 4),)),
        (0, (Slice(1, 0, 5),)),
        (2, (Slice(0, 0, 8),)),
        (3, (Slice(1, 0, 9),)),
    ]


def test_short_prompts_share_one_budget() -> None:
    scheduler = scheduler_of()
    for seq_id, num_tokens in enumerate([20, 20, 4]):
        add(scheduler, seq_id, num_tokens)
    assert planned(step(scheduler, Lane.PREFILL)) == [2, 0]
    assert planned(step(scheduler, Lane.PREFILL)) == [1]


def test_long_prompts_share_a_step_when_their_stages_fit() -> None:
    scheduler = scheduler_of(stage_tokens=64)
    for seq_id, num_tokens in enumerate([30, 36, 24]):
        add(scheduler, seq_id, num_tokens)
    assert planned(step(scheduler, Lane.PREFILL)) == [2, 0]
    assert planned(step(scheduler, Lane.PREFILL)) == [1]


def test_a_stage_larger_than_the_budget_still_runs() -> None:
    scheduler = scheduler_of(stage_tokens=1)
    add(scheduler, 0, 30)
    add(scheduler, 1, 10)
    plan = step(scheduler, Lane.PREFILL)
    assert plan is not None
    assert [item.num_tokens for item in plan.work] == [10, 16]  # a whole prompt; one zigzag unit


def test_a_short_prompt_too_big_for_one_rank_is_split() -> None:
    scheduler = scheduler_of(pages_per_rank=4, long_tokens=100)
    assert is_split(17, scheduler.config)
    add(scheduler, 0, 20)
    plan = scheduler.plan(Lane.PREFILL)
    assert plan is not None
    assert len({piece.rank for piece in plan.work[0].slices}) == 2


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
