"""DisaggScheduler with ranks dedicated to prefill or decode."""

from dataclasses import replace

from csps.core.plan import Lane, Work
from csps.core.request import FinishReason
from csps.sched.disagg import DisaggScheduler
from csps.sched.sequence import SequenceStatus
from tests.unit.scheduling import CONFIG, add, finish, planned, step


def scheduler_of(
    *, prefill: tuple[int, ...], decode: tuple[int, ...], **changes: int
) -> DisaggScheduler:
    config = replace(CONFIG, prefill_ranks=prefill, decode_ranks=decode, **changes)
    return DisaggScheduler(config)


def ranks_of(work: Work) -> list[int]:
    return [piece.rank for piece in work.slices]


def test_prompts_go_to_prefill_ranks_long_or_short() -> None:
    scheduler = scheduler_of(num_ranks=4, prefill=(1, 3), decode=(0, 2))
    for seq_id, num_tokens in enumerate([8, 9, 32]):
        add(scheduler, seq_id, num_tokens)
    plan = scheduler.plan(Lane.PREFILL)
    assert plan is not None
    assert [ranks_of(item) for item in plan.work] == [[1], [3], [1, 3, 3, 1]]


def test_the_master_moves_to_a_decode_rank_with_the_first_new_block() -> None:
    scheduler = scheduler_of(num_ranks=4, prefill=(1, 3), decode=(0, 2), long_tokens=100)
    add(scheduler, 0, 6, max_tokens=12)
    step(scheduler, Lane.PREFILL)
    masters = []
    for _ in range(10):
        plan = step(scheduler, Lane.DECODE)
        assert plan is not None
        masters += ranks_of(plan.work[0])
    # Two tokens fill the prompt's last block; then it stays whole on one decode rank.
    assert masters == [1] * 2 + [0] * 8


def test_a_long_sequence_grows_over_all_decode_ranks() -> None:
    scheduler = scheduler_of(num_ranks=3, prefill=(0,), decode=(1, 2))
    add(scheduler, 0, 32)
    step(scheduler, Lane.PREFILL)
    for _ in range(16):
        step(scheduler, Lane.DECODE)
    assert scheduler.ledger.blocks_by_rank(0) == (8, 2, 2)


def test_output_is_bounded_by_what_prefill_ranks_could_compute_again() -> None:
    scheduler = scheduler_of(prefill=(0,), decode=(1,), pages_per_rank=5)
    seq = add(scheduler, 0, 15)
    step(scheduler, Lane.PREFILL)
    while seq.status is SequenceStatus.RUNNING:
        events = finish(scheduler, scheduler.plan(Lane.DECODE))
    assert events[0].finish is FinishReason.LENGTH
    assert seq.num_tokens == 21  # one rank's 20, and the one drawn last


def test_a_short_prompt_leaves_decode_ranks_their_pages() -> None:
    scheduler = scheduler_of(prefill=(0, 1), decode=(0,), pages_per_rank=6)
    add(scheduler, 0, 20)
    step(scheduler, Lane.PREFILL)
    assert scheduler.ledger.blocks_by_rank(0) == (5, 0)
    add(scheduler, 1, 4)
    plan = scheduler.plan(Lane.PREFILL)
    assert plan is not None
    assert ranks_of(plan.work[0]) == [1]  # rank 0 would have no page left


def test_nothing_starts_while_decode_ranks_are_full() -> None:
    scheduler = scheduler_of(num_ranks=3, prefill=(0, 1), decode=(2,), pages_per_rank=4)
    add(scheduler, 0, 8)
    step(scheduler, Lane.PREFILL)
    for _ in range(13):
        step(scheduler, Lane.DECODE)
    assert scheduler.ledger.free_by_rank() == [2, 4, 0]
    add(scheduler, 1, 4)
    assert scheduler.plan(Lane.PREFILL) is None
    scheduler.abort(0)
    assert planned(scheduler.plan(Lane.PREFILL)) == [1]


def test_alone_on_full_decode_ranks_ends_with_length() -> None:
    scheduler = scheduler_of(num_ranks=3, prefill=(0, 1), decode=(2,), pages_per_rank=4)
    seq = add(scheduler, 0, 8)
    step(scheduler, Lane.PREFILL)
    while seq.status is SequenceStatus.RUNNING:
        events = finish(scheduler, scheduler.plan(Lane.DECODE))
    assert events[0].finish is FinishReason.LENGTH
    assert seq.num_tokens == 8 + 16 + 1
    assert scheduler.kv_usage == 0.0


def test_who_yields_has_a_page_that_decode_can_use() -> None:
    scheduler = scheduler_of(num_ranks=3, prefill=(0, 1), decode=(2,), pages_per_rank=4)
    for seq_id in range(5):
        add(scheduler, seq_id, 4)
    add(scheduler, 5, 5)
    step(scheduler, Lane.PREFILL)
    assert planned(scheduler.plan(Lane.DECODE)) == [0, 1, 2, 3, 5]  # 5 has none to give
    assert scheduler.released() == [4]
