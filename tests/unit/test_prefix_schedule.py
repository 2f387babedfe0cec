"""What schedulers do with the prefix cache, rule by rule."""

from dataclasses import replace

import pytest

from csps.core.attention import DENSE, AttentionKind, AttentionParams
from csps.core.plan import Lane
from csps.sched.chunked import ChunkedScheduler
from csps.sched.disagg import DisaggScheduler
from tests.unit.scheduling import CACHING, DOCUMENT, ask, finish, planned, serve, step, work_of

CSA, WIDER = (AttentionParams(AttentionKind.CSA, gamma=gamma) for gamma in (0.9, 0.95))
NEAR, FAR = (AttentionParams(AttentionKind.CSA_DISTANCE, window_blocks=num) for num in (4, 5))


def disagg(**changes: object) -> DisaggScheduler:
    return DisaggScheduler(replace(CACHING, **changes))


def chunked(**changes: object) -> ChunkedScheduler:
    return ChunkedScheduler(replace(CACHING, num_ranks=1, **changes))


# Both schedules


@pytest.mark.parametrize("scheduler_of", [disagg, chunked])
def test_only_what_is_new_is_computed(scheduler_of) -> None:
    scheduler = scheduler_of()
    assert serve(scheduler, 0, DOCUMENT).num_cached == 0
    seq = ask(scheduler, 1, (*DOCUMENT, 1, 2, 3))
    plan = scheduler.plan(scheduler.lanes[0])
    work = work_of(plan, 1)
    assert (work.start, [*work.token_ids], work.sample) == (64, [1, 2, 3], True)
    assert work.sampling is not None
    pages = [(e.rank, e.first_page + at) for e in work.new_extents for at in range(e.num_pages)]
    assert len(pages) == 17
    assert scheduler.kv_usage == 17 / scheduler.config.total_pages
    assert (seq.num_cached, seq.num_computed) == (64, 64)
    finish(scheduler, plan)
    assert seq.num_computed == 67


@pytest.mark.parametrize("scheduler_of", [disagg, chunked])
def test_the_last_token_is_always_computed(scheduler_of) -> None:
    scheduler = scheduler_of()
    serve(scheduler, 0, DOCUMENT)
    assert serve(scheduler, 1, DOCUMENT).num_cached == 60


@pytest.mark.parametrize("scheduler_of", [disagg, chunked])
def test_blocks_that_decode_fills_are_found_by_the_next_turn(scheduler_of) -> None:
    scheduler = scheduler_of()
    first = serve(scheduler, 0, DOCUMENT, max_tokens=10)
    turn = (*DOCUMENT, *first.output_ids, 5, 6, 7)
    assert serve(scheduler, 1, turn).num_cached == 72  # of 73 with KV


@pytest.mark.parametrize("scheduler_of", [disagg, chunked])
def test_nothing_is_read_while_the_step_that_writes_it_runs(scheduler_of) -> None:
    scheduler = scheduler_of(stage_tokens=1000, token_budget=100, long_tokens=100)
    lane = scheduler.lanes[0]
    ask(scheduler, 0, DOCUMENT)
    plan = scheduler.plan(lane)
    early = ask(scheduler, 1, (*DOCUMENT, 1))
    assert early.expected_cached == 0
    assert scheduler.plan(lane) is None
    finish(scheduler, plan)
    assert planned(scheduler.plan(lane)) == ([1] if lane is Lane.PREFILL else [0, 1])
    assert early.num_cached == 64  # though it came before there was any


@pytest.mark.parametrize("scheduler_of", [disagg, chunked])
def test_off_nothing_is_kept(scheduler_of) -> None:
    scheduler = scheduler_of(prefix_cache=False)
    serve(scheduler, 0, DOCUMENT)
    assert serve(scheduler, 1, DOCUMENT).num_cached == 0
    assert scheduler.ledger.cache_stats == (0, 0, 0, 0)


@pytest.mark.parametrize("scheduler_of", [disagg, chunked])
def test_a_prompt_that_is_scored_is_computed_from_its_start(scheduler_of) -> None:
    scheduler = scheduler_of()
    serve(scheduler, 0, DOCUMENT)
    assert serve(scheduler, 1, DOCUMENT, prompt_logprobs=1).num_cached == 0
    assert serve(scheduler, 2, DOCUMENT).num_cached == 60


@pytest.mark.parametrize("scheduler_of", [disagg, chunked])
def test_what_is_aborted_leaves_what_it_computed(scheduler_of) -> None:
    scheduler = scheduler_of()
    ask(scheduler, 0, DOCUMENT)
    step(scheduler, scheduler.lanes[0])
    scheduler.abort(0)
    assert serve(scheduler, 1, DOCUMENT).num_cached == 32


# How KV was computed


@pytest.mark.parametrize(
    ("first", "second", "num_cached"),
    [
        (DENSE, DENSE, 60),
        (DENSE, CSA, 60),
        (CSA, DENSE, 0),
        (CSA, CSA, 60),
        (CSA, WIDER, 0),
        (WIDER, CSA, 0),
        (CSA, NEAR, 0),
        (NEAR, NEAR, 60),
        (NEAR, FAR, 0),
        (NEAR, DENSE, 0),
        (CSA, replace(CSA, seed=7, window_blocks=3), 60),
        (WIDER, replace(WIDER, gamma=0.949999988079071), 60),  # in single precision
        (DENSE, replace(DENSE, gamma=0.5, window_blocks=3), 60),
    ],
)
def test_who_may_read_whose_kv(
    first: AttentionParams, second: AttentionParams, num_cached: int
) -> None:
    scheduler = disagg()
    serve(scheduler, 0, DOCUMENT, first)
    assert serve(scheduler, 1, DOCUMENT, second).num_cached == num_cached


def test_a_sparse_prompt_goes_on_from_exact_blocks_and_taints_what_follows() -> None:
    scheduler = disagg()
    serve(scheduler, 0, DOCUMENT[:32])
    sparse = serve(scheduler, 1, DOCUMENT, CSA, max_tokens=10)
    assert sparse.num_cached == 32
    longer = (*DOCUMENT, *sparse.output_ids, 5)
    # Decode is exact, but over keys that are not.
    assert serve(scheduler, 2, longer).num_cached == 32
    assert serve(scheduler, 3, longer, CSA).num_cached == 72


# Preemption


def test_a_preempted_sequence_finds_its_own_blocks() -> None:
    scheduler = disagg(num_ranks=1, pages_per_rank=7, long_tokens=100)
    ask(scheduler, 0, range(11))
    late = ask(scheduler, 1, range(50, 61))
    step(scheduler, Lane.PREFILL)
    step(scheduler, Lane.DECODE)
    plan = scheduler.plan(Lane.DECODE)
    assert scheduler.released() == [1]
    assert late.num_computed == 0
    scheduler.abort(0)
    finish(scheduler, plan)
    work = work_of(scheduler.plan(Lane.PREFILL), 1)
    assert (work.start, work.stop) == (12, 13)
    assert late.num_cached == 0  # the prompt's, when it first started


# ChunkedScheduler


def test_chunks_begin_behind_the_prefix() -> None:
    scheduler = chunked()
    serve(scheduler, 0, DOCUMENT)
    ask(scheduler, 1, (*DOCUMENT, *range(40)))
    ask(scheduler, 2, (*DOCUMENT, 1, 2, 3))
    plan = scheduler.plan(Lane.MIXED)
    assert [(work.start, work.stop) for work in plan.work] == [(64, 96)]
    finish(scheduler, plan)
    plan = scheduler.plan(Lane.MIXED)
    assert [(work.start, work.stop) for work in plan.work] == [(96, 104), (64, 67)]


def test_the_watermark_counts_pages_that_the_prefix_shares() -> None:
    scheduler = chunked(pages_per_rank=20)
    ask(scheduler, 0, DOCUMENT)
    for _ in range(2):
        step(scheduler, Lane.MIXED)
    ask(scheduler, 1, (*DOCUMENT, 1, 2, 3))  # 17 blocks, 16 of which are there
    assert 1 in planned(scheduler.plan(Lane.MIXED))
