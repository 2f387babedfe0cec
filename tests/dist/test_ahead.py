"""Decode planned a step ahead: ranks draw what they draw otherwise, from tokens of their own."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from csps.core.plan import Lane, Layout
from csps.core.request import SamplingParams
from csps.core.strategy import Placement
from tests.checkpoints import write_tiny
from tests.dist.ranks import Job, Outcome, Request, run_ranks, serve
from tests.dist.test_decode_layouts import IN_TURN
from tests.dist.test_parity import check, greedy, prompts, sampling

# Ranks, those that share a weight, the sizes of buckets, and whether transfers are staged.
RANKS = [
    (1, 1, (), False),
    (3, 1, (1, 8), False),
    (4, 2, (), False),
    (2, 2, (), True),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


def pending(outcome: Outcome) -> set[tuple[Layout, Layout]]:
    """Layouts of steps that drew a token nobody knew yet, and of those that went on with it."""
    steps = [plan for plan in outcome.plans if plan.lane is not Lane.PREFILL]
    return {
        (before.layout, plan.layout)
        for before, plan in pairwise(steps)
        if any(work.pending for work in plan.work)
    }


@pytest.mark.parametrize("placement", Placement)
@pytest.mark.parametrize(("num_ranks", "tp", "buckets", "staged"), RANKS)
def test_greedy_sequences_in_layouts_that_change(
    llama: Path,
    placement: Placement,
    num_ranks: int,
    tp: int,
    buckets: tuple[int, ...],
    staged: bool,
) -> None:
    """Blocks of 4, so that rows change their ranks, and whoever computes one must be told."""
    texts = prompts((3, 17, 150, 33))
    requests = tuple(
        Request(text, sampling(8 + 3 * i), start_step=3 * i) for i, text in enumerate(texts)
    )
    # Each layout after itself and after the other.
    twice = tuple(layout for layout in IN_TURN for _ in range(2))
    by_head = placement is Placement.HEADS
    job = Job(
        llama,
        requests,
        tp=tp,
        placement=placement,
        layouts=twice if by_head else (Layout.SP,),
        decode_layouts=twice,
        buckets=buckets,
        staged=staged,
        ahead=True,
    )
    outcomes = run_ranks(num_ranks, serve, job)
    check(outcomes, [greedy(llama, text, 8 + 3 * i) for i, text in enumerate(texts)])
    assert pending(outcomes[0]) == {(a, b) for a in IN_TURN for b in IN_TURN}


@pytest.mark.parametrize("placement", Placement)
def test_stopped_preempted_and_drawn(llama: Path, placement: Placement) -> None:
    """What stops is computed once in vain, and harms nobody; few pages, so some start anew."""
    drawn = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.9, top_p=0.95, logprobs=2)
    requests = tuple(
        Request(text, replace(drawn, seed=i), start_step=i)
        for i, text in enumerate(prompts((20, 31, 18, 26, 22), seed=3))
    )
    job = Job(llama, requests, placement=placement)
    (free,) = run_ranks(1, serve, job)
    stops = free.outputs[0][12], free.outputs[1][50]
    requests = tuple(
        replace(one, sampling=replace(one.sampling, stop_token_ids=stops)) for one in requests
    )
    few = 14 if placement is Placement.TOKENS else 28  # of each rank
    outcomes = run_ranks(2, serve, replace(job, requests=requests, num_pages=few, ahead=True))
    check(outcomes, [_until(output, stops) for output in free.outputs])
    assert outcomes[0].num_preemptions > 0
    assert len(outcomes[0].outputs[0]) < 60


def _until(output: tuple[int, ...], stops: tuple[int, ...]) -> tuple[int, ...]:
    ends = [index for index, token_id in enumerate(output) if token_id in stops]
    return output[: ends[0] + 1] if ends else output


def test_cancelled_neighbours(llama: Path) -> None:
    """Streams that end while two steps have them change nothing for those beside them."""
    texts = prompts((20, 90, 200, 33, 70, 10), seed=3)
    keep = (0, 2, 4)
    requests = tuple(
        Request(text, sampling(12), start_step=2 * i, abort_after=None if i in keep else i)
        for i, text in enumerate(texts)
    )
    outcomes = run_ranks(2, serve, Job(llama, requests, ahead=True))
    for outcome in outcomes:
        for index in keep:
            assert outcome.outputs[index] == greedy(llama, texts[index], 12)
