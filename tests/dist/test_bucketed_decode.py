"""Decode in buckets, as CUDA graphs run it: what the plain way draws, whoever joins or leaves."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from csps.core.config import DType, WorkerSetup
from csps.core.plan import Lane, Layout
from csps.core.request import SamplingParams
from csps.core.strategy import Placement
from csps.engine.bucketed import Forward, bucket_sizes
from csps.worker.build import build_runner
from csps.worker.place import Place, connect_ranks
from tests.checkpoints import write_tiny
from tests.dist.ranks import Job, Request, in_buckets, run_ranks, serve
from tests.dist.test_decode_layouts import (
    ELEMENT_BYTES,
    HEAD_DIM,
    HEADS,
    IN_TURN,
    NUM_LAYERS,
)
from tests.dist.test_parity import check, greedy, prompts, sampling


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


def test_sizes() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(2) == [1, 2]
    assert bucket_sizes(5) == [1, 2, 4, 5]
    assert bucket_sizes(64) == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("placement", Placement)
def test_greedy_sequences_that_join_and_leave(llama: Path, placement: Placement) -> None:
    texts = prompts((3, 17, 90, 5, 33, 4))
    requests = tuple(
        Request(text, sampling(6 + 5 * i), start_step=4 * i) for i, text in enumerate(texts)
    )
    job = Job(llama, requests, placement=placement, buckets=(2, 8))
    outcomes = run_ranks(1, serve, job)
    check(outcomes, [greedy(llama, text, 6 + 5 * i) for i, text in enumerate(texts)])
    (outcome,) = outcomes
    sizes = {len(plan.work) for plan in outcome.plans if plan.lane is not Lane.PREFILL}
    assert {1, 2, 3, 4} <= sizes
    assert outcome.num_bucketed > 20


@pytest.mark.parametrize("placement", Placement)
@pytest.mark.parametrize(("num_ranks", "tp"), [(2, 1), (3, 1), (4, 2), (2, 2)])
def test_ranks_that_switch_layouts(
    llama: Path, placement: Placement, num_ranks: int, tp: int
) -> None:
    """Prompts whole on a rank and over all, so that ranks have different numbers of rows."""
    texts = prompts((3, 17, 90, 150, 33, 4))
    requests = tuple(
        Request(text, sampling(8 + 3 * i), start_step=3 * i) for i, text in enumerate(texts)
    )
    job = Job(
        llama,
        requests,
        tp=tp,
        placement=placement,
        layouts=IN_TURN,
        decode_layouts=IN_TURN,
        buckets=(1, 2, 8),
    )
    if placement is Placement.TOKENS:
        job = replace(job, layouts=(Layout.SP,))
    outcomes = run_ranks(num_ranks, serve, job)
    check(outcomes, [greedy(llama, text, 8 + 3 * i) for i, text in enumerate(texts)])
    steps = [plan for plan in outcomes[0].plans if plan.lane is not Lane.PREFILL]
    single = [plan for plan in steps if all(work.num_tokens == 1 for work in plan.work)]
    assert {plan.layout for plan in single} == set(IN_TURN)
    assert {outcome.num_bucketed for outcome in outcomes} == {len(single)}


def test_bytes_do_not_depend_on_who_holds_what(llama: Path) -> None:
    """A bucket of 4 rows: everyone's go to everyone else, and as many answers come back."""
    size, rows = 2, 4
    job = Job(llama, (Request(prompts((9,))[0], sampling(6)),), buckets=(rows,))
    for outcome in run_ranks(size, serve, job):
        decode = [result for result in outcome.results if result.lane is Lane.DECODE]
        assert decode
        for result in decode:
            query = rows * (size - 1) * NUM_LAYERS * HEADS * HEAD_DIM * ELEMENT_BYTES
            lse = rows * (size - 1) * NUM_LAYERS * HEADS * 4
            assert result.stats.bytes_sent == {"query": query, "partial": query + lse}
            assert result.stats.bytes_received == result.stats.bytes_sent


def test_drawn_preempted_and_more_than_a_bucket_holds(llama: Path) -> None:
    """Draws with log-probabilities, and so few pages that sequences are computed anew."""
    drawn = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.9, top_p=0.95, logprobs=2)
    requests = tuple(
        Request(text, replace(drawn, seed=i), start_step=i)
        for i, text in enumerate(prompts((20, 31, 18, 26, 22), seed=3))
    )
    job = Job(llama, requests, num_pages=40)
    (plain,), (bucketed,) = (
        run_ranks(1, serve, one) for one in (job, replace(job, buckets=(1, 4)))
    )
    assert bucketed.outputs == plain.outputs
    assert bucketed.num_preemptions == plain.num_preemptions > 0
    sizes = {len(plan.work) for plan in bucketed.plans if plan.lane is Lane.DECODE}
    assert max(sizes) == 5  # that step had no bucket
    assert 0 < bucketed.num_bucketed < sum(p.lane is Lane.DECODE for p in bucketed.plans)


def test_closing_ends_graphs(llama: Path) -> None:
    """At once, though nothing collects garbage: a communicator's end waits for them."""
    run_ranks(1, close_with_graphs, llama)


def close_with_graphs(place: Place, model: Path) -> None:
    setup = WorkerSetup(
        str(model), dtype=DType.FLOAT32, block_size=4, kv_memory_bytes=1 << 20, max_model_len=64
    )
    mesh = connect_ranks(setup, place, torch.device("cpu"))
    runner = build_runner(setup, place, mesh).runner
    graphs: weakref.WeakSet[Callable[[], object]] = weakref.WeakSet()

    def capture(forward: Forward) -> Forward:
        output = forward()

        def replay() -> Tensor | None:
            return output

        graphs.add(replay)
        return replay

    runner.bucketed = in_buckets(runner, (1, 2), capture)
    gc.disable()
    assert len(graphs) == 2
    runner.close()
    assert not graphs
    dist.destroy_process_group()
