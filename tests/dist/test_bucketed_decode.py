"""Decode in buckets, as CUDA graphs run it: what the plain way draws, whoever joins or leaves."""

from dataclasses import replace
from pathlib import Path

import pytest

from csps.core.plan import Lane
from csps.core.request import SamplingParams
from csps.core.strategy import Placement
from csps.engine.bucketed import bucket_sizes
from tests.checkpoints import write_tiny
from tests.dist.ranks import Job, Request, run_ranks, serve
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
