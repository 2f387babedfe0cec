"""Planning a lane one step ahead: who is in that plan, and how sequences end under it."""

from collections import deque
from dataclasses import replace

import pytest

from csps.core.plan import Lane, StepPlan
from csps.core.request import FinishReason, SamplingParams
from csps.core.shards import Extent, Slice
from csps.sched.chunked import ChunkedScheduler
from csps.sched.disagg import DisaggScheduler
from csps.sched.scheduler import Scheduler
from csps.sched.sequence import Sequence, SequenceStatus, TokenEvent
from tests.unit.scheduling import CONFIG, add, finish, planned, sequence, step, work_of
from tests.unit.simulated_ranks import SimulatedRanks, prompt_of

STOP = 8  # `finish` draws 7 unless told otherwise

Outputs = dict[int, tuple[list[int], FinishReason]]

both = pytest.mark.parametrize("kind", [DisaggScheduler, ChunkedScheduler])


def scheduler_of(kind: type[Scheduler], **changes: int) -> Scheduler:
    return kind(replace(CONFIG, **{"num_ranks": 1, **changes}))


def decoding(kind: type[Scheduler], *sequences: Sequence, **changes: int) -> Scheduler:
    """A scheduler with sequences that have drawn their first token."""
    scheduler = scheduler_of(kind, **changes)
    for seq in sequences:
        scheduler.add(seq)
    assert len(planned(step(scheduler, scheduler.lanes[0]))) == len(sequences)
    return scheduler


def plan(scheduler: Scheduler, *, ahead: bool = False) -> StepPlan | None:
    """A step of the lane that decodes."""
    return scheduler.plan(scheduler.lanes[-1], ahead=ahead)


def rows(step_plan: StepPlan | None) -> list[tuple[int, int, list[int], bool]]:
    """(sequence, position, tokens, pending) of a plan's work."""
    work = () if step_plan is None else step_plan.work
    return [(item.seq_id, item.start, [*item.token_ids], item.pending) for item in work]


def ranges(step_plan: StepPlan | None) -> list[tuple[int, int, int]]:
    """(sequence, start, stop) of a plan's work, none of it pending."""
    work = () if step_plan is None else step_plan.work
    assert not any(item.pending for item in work)
    return [(item.seq_id, item.start, item.stop) for item in work]


def ends(events: list[TokenEvent]) -> dict[int, FinishReason | None]:
    return {event.seq.seq_id: event.finish for event in events}


# Who is in the plan


@both
def test_what_the_step_under_way_draws_is_pending(kind: type[Scheduler]) -> None:
    seq = sequence(0, 5)
    scheduler = decoding(kind, seq, sequence(1, 9))
    now = plan(scheduler)
    assert rows(now) == [(0, 5, [7], False), (1, 9, [7], False)]
    then = plan(scheduler, ahead=True)
    assert rows(then) == [(0, 6, [0], True), (1, 10, [0], True)]
    assert work_of(then, 1).slices == (Slice(0, 10, 11),)
    assert work_of(then, 1).sample
    assert ends(finish(scheduler, now)) == {0: None, 1: None}
    assert (seq.num_computed, seq.num_planned) == (6, 7)
    assert ends(finish(scheduler, then)) == {0: None, 1: None}
    assert rows(plan(scheduler)) == [(0, 7, [7], False), (1, 11, [7], False)]


def test_a_pending_token_is_computed_where_its_block_begins() -> None:
    scheduler = decoding(DisaggScheduler, sequence(0, 7), num_ranks=2, long_tokens=4)
    now, then = plan(scheduler), plan(scheduler, ahead=True)
    assert work_of(now, 0).slices == (Slice(1, 7, 8),)
    assert work_of(then, 0).slices == (Slice(0, 8, 9),)
    assert work_of(then, 0).new_extents == (Extent(0, 1, 1),)


@both
def test_two_steps_are_in_flight_at_most(kind: type[Scheduler]) -> None:
    scheduler = decoding(kind, sequence(0, 5))
    now = plan(scheduler, ahead=True)
    assert rows(now) == [(0, 5, [7], False)]  # none was in flight
    assert plan(scheduler) is None
    then = plan(scheduler, ahead=True)
    assert rows(then) == [(0, 6, [0], True)]
    assert plan(scheduler, ahead=True) is None
    finish(scheduler, now)
    assert plan(scheduler) is None
    assert rows(plan(scheduler, ahead=True)) == [(0, 7, [0], True)]


@both
def test_whose_last_token_is_being_drawn_has_no_step_ahead(kind: type[Scheduler]) -> None:
    scheduler = decoding(kind, sequence(0, 5, max_tokens=3), sequence(1, 5, max_tokens=2))
    now, then = plan(scheduler), plan(scheduler, ahead=True)
    assert (planned(now), planned(then)) == ([0, 1], [0])
    assert ends(finish(scheduler, now)) == {0: None, 1: FinishReason.LENGTH}
    assert scheduler.released() == [1]
    assert plan(scheduler, ahead=True) is None  # nobody else decodes
    assert ends(finish(scheduler, then)) == {0: FinishReason.LENGTH}
    assert not scheduler.has_work(scheduler.lanes[-1])


def test_whoever_joins_decode_between_two_plans_brings_its_token() -> None:
    scheduler = decoding(DisaggScheduler, sequence(0, 5))
    now = plan(scheduler)
    add(scheduler, 1, 9, max_tokens=2)
    step(scheduler, Lane.PREFILL)
    assert planned(now) == [0]
    assert rows(plan(scheduler, ahead=True)) == [(0, 6, [0], True), (1, 9, [7], False)]


# Ends


@both
def test_a_stop_token_ends_a_sequence_that_the_step_ahead_has(kind: type[Scheduler]) -> None:
    scheduler = decoding(kind, sequence(0, 5), sequence(1, 9, stop_token_ids=(STOP,)))
    now, then = plan(scheduler), plan(scheduler, ahead=True)
    assert planned(then) == [0, 1]
    assert ends(finish(scheduler, now, STOP)) == {0: None, 1: FinishReason.STOP}
    assert scheduler.released() == []
    assert scheduler.ledger.used_pages(0) == 2 + 3
    assert planned(plan(scheduler, ahead=True)) == [0]
    assert ends(finish(scheduler, then)) == {0: None}
    assert scheduler.released() == [1]
    assert scheduler.ledger.used_pages(0) == 2


@both
def test_who_has_ended_holds_its_pages_until_its_last_step_ends(kind: type[Scheduler]) -> None:
    stopping = sequence(1, 7, stop_token_ids=(STOP,))
    scheduler = decoding(kind, sequence(0, 10), stopping, pages_per_rank=6)
    now, then = plan(scheduler), plan(scheduler, ahead=True)
    assert scheduler.kv_usage == 1.0
    finish(scheduler, now, STOP)
    assert plan(scheduler, ahead=True) is None  # 0 needs a block
    finish(scheduler, then)
    assert scheduler.released() == [1]
    assert rows(plan(scheduler)) == [(0, 12, [7], False)]
    assert scheduler.num_preemptions == 0


@both
def test_an_aborted_sequence_ends_with_the_second_step_it_is_in(kind: type[Scheduler]) -> None:
    seq = sequence(1, 9)
    scheduler = decoding(kind, sequence(0, 5), seq)
    now, then = plan(scheduler), plan(scheduler, ahead=True)
    assert scheduler.abort(1)
    assert not scheduler.abort(1)
    assert ends(finish(scheduler, now)) == {0: None}
    assert (scheduler.released(), seq.status) == ([], SequenceStatus.RUNNING)
    assert scheduler.ledger.holds(1)
    assert planned(plan(scheduler, ahead=True)) == [0]
    assert ends(finish(scheduler, then)) == {0: None}
    assert (scheduler.released(), seq.status) == ([1], SequenceStatus.FINISHED)
    assert not scheduler.ledger.holds(1)


# KV runs out


@both
def test_without_a_page_for_every_block_there_is_no_step_ahead(kind: type[Scheduler]) -> None:
    scheduler = decoding(kind, sequence(0, 11), sequence(1, 11), pages_per_rank=7)
    now = plan(scheduler)  # both write their third block full
    assert scheduler.ledger.free_pages(0) == 1
    assert plan(scheduler, ahead=True) is None
    assert (scheduler.num_preemptions, scheduler.released()) == (0, [])
    finish(scheduler, now)
    assert rows(plan(scheduler)) == [(0, 12, [7], False)]
    assert (scheduler.num_preemptions, scheduler.released()) == (1, [1])


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("kind", "ranks", "num_kv"),
    [
        (DisaggScheduler, {}, 12),
        (DisaggScheduler, {"num_ranks": 2, "decode_ranks": (1,)}, 8 + 12),  # begun on rank 0
        (ChunkedScheduler, {}, 12),
    ],
)
def test_alone_it_fills_every_page(
    kind: type[Scheduler], ranks: dict[str, int], num_kv: int, ahead: bool
) -> None:
    seq = sequence(0, 5)
    scheduler = decoding(kind, seq, pages_per_rank=3, **ranks)
    in_flight: deque[StepPlan] = deque()
    events: list[TokenEvent] = []
    while not events or events[-1].finish is None:
        assert len(events) < 20
        for _ in range(1 + ahead):
            if (next_plan := plan(scheduler, ahead=ahead)) is not None:
                in_flight.append(next_plan)
        events += finish(scheduler, in_flight.popleft())
    assert events[-1].finish is FinishReason.LENGTH
    assert seq.num_tokens == num_kv + 1  # the last one drawn needs no KV
    assert (len(in_flight), scheduler.num_preemptions) == (0, 0)
    assert scheduler.released() == [0]


# Prompts


def test_prompts_of_a_lane_of_their_own_wait_for_the_step_under_way() -> None:
    scheduler = decoding(DisaggScheduler, sequence(0, 5), num_ranks=2)
    add(scheduler, 1, 64)
    now = scheduler.plan(Lane.PREFILL)
    assert ranges(now) == [(1, 0, 32)]
    add(scheduler, 2, 5)
    assert scheduler.plan(Lane.PREFILL, ahead=True) is None
    finish(scheduler, now)
    assert ranges(scheduler.plan(Lane.PREFILL, ahead=True)) == [(2, 0, 5), (1, 32, 64)]


def test_prompts_of_a_mixed_lane_go_on_in_the_step_ahead() -> None:
    scheduler = scheduler_of(ChunkedScheduler, token_budget=10)
    add(scheduler, 0, 13)
    add(scheduler, 1, 40)
    now = plan(scheduler)
    assert ranges(now) == [(0, 0, 10)]
    then = plan(scheduler, ahead=True)
    assert ranges(then) == [(0, 10, 13), (1, 0, 7)]
    assert [*work_of(then, 0).token_ids] == [10, 11, 12]
    assert work_of(then, 1).new_extents == (Extent(0, 4, 10),)  # it may start there, too
    assert finish(scheduler, now) == []
    later = plan(scheduler, ahead=True)
    assert ranges(later) == [(1, 7, 16)]  # 0 ends its prompt; a token of the budget is kept for it
    assert ends(finish(scheduler, then)) == {0: None}
    assert ranges(plan(scheduler, ahead=True)) == [(0, 13, 14), (1, 16, 25)]
    assert scheduler.abort(1)
    finish(scheduler, later)
    assert scheduler.ledger.holds(1)  # a step has it
    assert rows(plan(scheduler, ahead=True)) == [(0, 14, [0], True)]


def test_a_prompt_that_ends_decodes_in_the_step_after_the_one_ahead() -> None:
    scheduler = decoding(ChunkedScheduler, sequence(0, 5))
    add(scheduler, 1, 9)
    now = plan(scheduler)
    assert rows(now) == [(0, 5, [7], False), (1, 0, [*range(9)], False)]
    then = plan(scheduler, ahead=True)
    assert rows(then) == [(0, 6, [0], True)]
    finish(scheduler, now)
    assert rows(plan(scheduler, ahead=True)) == [(0, 7, [0], True), (1, 9, [7], False)]


# All together


def serve(kind: type[Scheduler], ahead: bool, **changes: int) -> tuple[Scheduler, Outputs]:
    """Ten sequences from start to end, whose tokens follow from sequence and position."""
    scheduler = scheduler_of(kind, token_budget=16, **changes)
    ranks = SimulatedRanks(scheduler.config)
    for seq_id in range(10):
        prompt = prompt_of(seq_id, 2 + 5 * seq_id % 17)
        sampling = SamplingParams(max_tokens=6 + 11 * seq_id % 23)
        scheduler.add(Sequence(seq_id, prompt, sampling, eos_ids=frozenset({13})))
    in_flight: dict[Lane, deque[StepPlan]] = {lane: deque() for lane in scheduler.lanes}
    outputs: Outputs = {}
    for lane in 500 * scheduler.lanes:
        while (next_plan := scheduler.plan(lane, ahead=ahead)) is not None:
            ranks.release(scheduler.released())
            ranks.start(next_plan)
            in_flight[lane].append(next_plan)
            assert len(in_flight[lane]) <= 1 + ahead
        ranks.release(scheduler.released())
        if in_flight[lane]:
            ended = in_flight[lane].popleft()
            for seq, _, reason in scheduler.complete(ended, ranks.finish(ended)):
                if reason is not None:
                    outputs[seq.seq_id] = seq.output_ids, reason
            scheduler.check_integrity()
            ranks.release(scheduler.released())
    assert not any(scheduler.has_work(lane) for lane in scheduler.lanes)
    return scheduler, outputs


@pytest.mark.parametrize(
    ("kind", "num_ranks"), [(DisaggScheduler, 1), (DisaggScheduler, 2), (ChunkedScheduler, 1)]
)
def test_everyone_draws_the_same_tokens_as_without(kind: type[Scheduler], num_ranks: int) -> None:
    sizes = {"num_ranks": num_ranks, "pages_per_rank": 12 // num_ranks}
    scheduler, outputs = serve(kind, ahead=True, **sizes)
    usual_scheduler, usual = serve(kind, ahead=False, **sizes)
    assert outputs == usual
    reasons = [reason for _, reason in outputs.values()]
    assert (reasons.count(FinishReason.STOP), reasons.count(FinishReason.LENGTH)) == (6, 4)
    assert min(scheduler.num_preemptions, usual_scheduler.num_preemptions) > 0
