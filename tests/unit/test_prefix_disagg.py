"""What DisaggScheduler does with the prefix cache: stages, ranks, order, budgets."""

from dataclasses import replace

from csps.core.plan import Lane
from csps.core.shards import Slice, tokens_by_rank
from csps.sched.disagg import DisaggScheduler
from tests.unit.scheduling import CACHING, DOCUMENT, ask, finish, planned, serve, step, work_of


def disagg(**changes: int) -> DisaggScheduler:
    return DisaggScheduler(replace(CACHING, **changes))


def test_stages_are_cut_behind_the_prefix() -> None:
    scheduler = disagg()
    serve(scheduler, 0, DOCUMENT)
    ask(scheduler, 1, (*DOCUMENT, *range(70)))
    stages = []
    while scheduler.has_work(Lane.PREFILL):
        plan = scheduler.plan(Lane.PREFILL)
        stages.append(work_of(plan, 1))
        finish(scheduler, plan)
    assert [(work.start, work.stop) for work in stages] == [(64, 96), (96, 128), (128, 134)]
    assert [tokens_by_rank(work.slices, 2) for work in stages[:2]] == [[16, 16], [16, 16]]


def test_few_new_tokens_stay_on_the_rank_that_has_most_of_the_prefix() -> None:
    scheduler = disagg()
    serve(scheduler, 0, range(10))  # on rank 0
    ask(scheduler, 1, range(100, 120))
    ask(scheduler, 2, [*range(8), 50, 51])
    plan = scheduler.plan(Lane.PREFILL)
    # Shortest first: 2 tokens behind the prefix, then 20 where nothing is computed yet.
    assert [(item.seq_id, item.slices) for item in plan.work] == [
        (2, (Slice(0, 8, 10),)),
        (1, (Slice(1, 0, 20),)),
    ]


def test_a_long_prefix_leaves_few_tokens_whole() -> None:
    scheduler = disagg()
    serve(scheduler, 0, DOCUMENT)
    ask(scheduler, 1, (*DOCUMENT, *range(23)))
    ask(scheduler, 2, (*DOCUMENT, *range(30, 54)))
    plan = scheduler.plan(Lane.PREFILL)
    assert len({piece.rank for piece in work_of(plan, 1).slices}) == 1
    assert len({piece.rank for piece in work_of(plan, 2).slices}) == 2


def test_a_cached_long_prompt_goes_before_a_shorter_new_one() -> None:
    scheduler = disagg(max_running=1)
    serve(scheduler, 0, DOCUMENT)
    ask(scheduler, 1, range(20))
    ask(scheduler, 2, (*DOCUMENT, 1))
    assert planned(scheduler.plan(Lane.PREFILL)) == [2]


def test_budgets_count_what_is_new() -> None:
    scheduler = disagg()
    serve(scheduler, 0, DOCUMENT)
    for seq_id in range(1, 4):
        ask(scheduler, seq_id, (*DOCUMENT, *range(seq_id * 10, seq_id * 10 + 10)))
    ask(scheduler, 4, (*DOCUMENT, 1, 2, 3))
    assert planned(step(scheduler, Lane.PREFILL)) == [4, 1, 2]  # 23 of 32 tokens
    assert planned(step(scheduler, Lane.PREFILL)) == [3]


def test_where_the_prefix_leaves_no_room_the_sequence_starts_without_it() -> None:
    """All cached blocks on one of two ranks, half of a sequence that needs all pages."""
    scheduler = disagg(pages_per_rank=8, long_tokens=24)
    serve(scheduler, 0, range(23))  # five blocks of rank 0
    seq = serve(scheduler, 1, [*range(20), *range(50, 93)])
    assert seq.num_cached == 0
    assert seq.output_ids


def test_what_was_evicted_meanwhile_is_computed() -> None:
    scheduler = disagg(pages_per_rank=12, max_running=1)
    serve(scheduler, 0, DOCUMENT)
    ask(scheduler, 1, range(16))
    step(scheduler, Lane.PREFILL)
    seq = ask(scheduler, 2, (*DOCUMENT, 1))
    assert seq.num_left == 1
    step(scheduler, Lane.DECODE)  # takes a page, and there was no other
    scheduler.abort(1)
    plan = scheduler.plan(Lane.PREFILL)
    assert work_of(plan, 2).stop == 65
    assert 0 < work_of(plan, 2).start < 64
