"""Who goes first in the prefill lane: shortest remaining prefill, with ageing."""

from dataclasses import replace
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from csps.core.plan import Lane, StepPlan
from csps.sched.disagg import DisaggScheduler
from csps.sched.packing import prefill_order
from csps.sched.sequence import SequenceStatus
from tests.unit.scheduling import CONFIG, add, planned, sequence, step


def scheduler_of(**changes: float) -> DisaggScheduler:
    return DisaggScheduler(replace(CONFIG, **changes))


def stages(plan: StepPlan | None) -> list[tuple[int, int]]:
    """(sequence, stop) of a plan's work."""
    return [] if plan is None else [(item.seq_id, item.stop) for item in plan.work]


def test_a_shorter_long_prompt_goes_before_the_next_stage_of_a_very_long_one() -> None:
    scheduler = scheduler_of()
    book = add(scheduler, 0, 160)
    assert stages(step(scheduler, Lane.PREFILL)) == [(0, 32)]
    add(scheduler, 1, 60)
    assert stages(step(scheduler, Lane.PREFILL)) == [(1, 32)]
    assert book.status is SequenceStatus.PREFILLING
    assert scheduler.ledger.num_blocks(0) == 40  # it keeps its KV, and goes on where it was
    assert stages(step(scheduler, Lane.PREFILL)) == [(1, 60)]
    assert stages(step(scheduler, Lane.PREFILL)) == [(0, 64)]


def test_what_is_left_counts_not_the_whole_length() -> None:
    scheduler = scheduler_of()
    add(scheduler, 0, 160)
    for _ in range(4):
        step(scheduler, Lane.PREFILL)
    add(scheduler, 1, 60)  # longer than the last 32 of the other
    assert stages(step(scheduler, Lane.PREFILL)) == [(0, 160)]


def test_very_large_ageing_is_first_come_first_served() -> None:
    scheduler = scheduler_of(ageing=1e9)
    for seq_id, num_tokens in enumerate([160, 60, 30]):
        add(scheduler, seq_id, num_tokens)
    order = [seq_id for _ in range(8) for seq_id in planned(step(scheduler, Lane.PREFILL))]
    assert order == [0, 0, 0, 0, 0, 1, 1, 2]


def test_who_waits_for_kv_is_overtaken_only_until_it_has_aged() -> None:
    scheduler = scheduler_of(num_ranks=1, pages_per_rank=12, long_tokens=40, ageing=1.0)
    add(scheduler, 0, 16)
    step(scheduler, Lane.PREFILL)
    long = add(scheduler, 1, 40)
    started = []
    for seq_id in range(2, 14):
        add(scheduler, seq_id, 8, max_tokens=2)
        started += planned(step(scheduler, Lane.PREFILL))
        step(scheduler, Lane.DECODE)
    # Each makes later ones 8 + 1 tokens older than the long one, which is 32 longer.
    assert started == [2, 3, 4, 5]
    assert long.status is SequenceStatus.WAITING
    scheduler.abort(0)
    assert planned(scheduler.plan(Lane.PREFILL))[0] == 1


def test_a_full_house_keeps_what_is_under_way_going() -> None:
    scheduler = scheduler_of(max_running=1)
    add(scheduler, 0, 100)
    step(scheduler, Lane.PREFILL)
    add(scheduler, 1, 4)
    assert planned(step(scheduler, Lane.PREFILL)) == [0]


def test_a_preempted_sequence_is_not_overtaken_by_later_ones() -> None:
    late, later = sequence(0, 50), sequence(1, 1)
    late.arrival, later.arrival = 10, 11
    assert prefill_order(later, 0.5) < prefill_order(late, 0.5)
    late.append(7)
    assert prefill_order(late, 0.5) < prefill_order(later, 0.5)


@settings(max_examples=60, deadline=None)
@given(
    ageing=st.sampled_from([0.1, 0.5, 2.0]),
    num_long=st.integers(30, 100),
    lengths=st.lists(st.integers(1, 29), min_size=1, max_size=20),
    gap=st.integers(1, 3),
    num_ranks=st.integers(1, 3),
    stage_tokens=st.sampled_from([8, 30, 1000]),
)
def test_a_stream_of_shorter_prompts_starves_nobody(
    ageing: float,
    num_long: int,
    lengths: list[int],
    gap: int,
    num_ranks: int,
    stage_tokens: int,
) -> None:
    """Shorter prompts keep coming, more than KV and steps have room for."""
    scheduler = scheduler_of(
        num_ranks=num_ranks,
        pages_per_rank=-(-28 // num_ranks),
        stage_tokens=stage_tokens,
        long_tokens=16,
        ageing=ageing,
    )
    long = sequence(0, num_long)
    shorts = count(1)
    arrivals: dict[int, int] = {}
    for at in range(1000):
        while scheduler.num_waiting < 10 and at % gap == 0:
            seq_id = next(shorts)
            num_tokens = lengths[seq_id % len(lengths)]
            arrivals[seq_id] = add(scheduler, seq_id, num_tokens, max_tokens=3).arrival
        if at == 5:
            scheduler.add(long)
            arrivals[long.seq_id] = long.arrival
        step(scheduler, Lane.DECODE)
        begun = [arrivals[seq_id] for seq_id in planned(step(scheduler, Lane.PREFILL))]
        # Where a step has tokens for everyone, who has aged enough is first to get KV.
        if long.status is SequenceStatus.WAITING and at >= 5 and stage_tokens == 1000:
            assert max(begun, default=0) < long.arrival + num_long / ageing
        if long.status is SequenceStatus.RUNNING:
            return
    raise AssertionError("the long prompt never ended")
