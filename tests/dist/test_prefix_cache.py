"""Prompts that begin alike, on real ranks: KV read through the cache gives the same tokens."""

from dataclasses import replace
from pathlib import Path

import pytest

from csps.core.attention import AttentionKind, AttentionParams
from csps.core.plan import Layout, Work
from csps.core.strategy import Placement
from tests.checkpoints import write_tiny
from tests.dist.ranks import Job, Outcome, Request, run_ranks, serve
from tests.dist.test_parity import check, greedy, prompts, sampling

NUM_OUTPUT = 12
# gamma 1 keeps everything, so it must draw what dense attention draws.
ALL = AttentionParams(AttentionKind.CSA, gamma=1.0)
HEADS = {"placement": Placement.HEADS, "layouts": (Layout.SP, Layout.TP)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


def first_works(outcome: Outcome) -> dict[int, list[Work]]:
    """By request: its first step, and that of every restart."""
    works: dict[int, list[Work]] = {}
    for work in (work for plan in outcome.plans for work in plan.work):
        if work.sampling is not None:
            works.setdefault(work.seq_id, []).append(work)
    return works


def conversation() -> list[tuple[int, ...]]:
    """A document, twice; parts of it with short and long ends; a short prompt, twice."""
    document, ends, short = prompts((150, 90, 13), seed=7)
    return [
        document,
        document,
        (*document, *ends[:5]),
        (*document[:70], *ends),
        (*document[:101], *ends[50:60]),
        short,
        (*short, *ends[:3]),
    ]


@pytest.mark.parametrize(
    ("placement", "gap"), [(Placement.TOKENS, 0), (Placement.TOKENS, 5), (Placement.HEADS, 5)]
)
def test_what_begins_alike_is_computed_once(llama: Path, placement: Placement, gap: int) -> None:
    """All at once, or each while those before it still run; then once more, all cached."""
    texts = conversation() * 2
    requests = tuple(
        Request(text, sampling(NUM_OUTPUT), start_step=gap * at + 300 * (at > 6))
        for at, text in enumerate(texts)
    )
    job = Job(llama, requests, **(HEADS if placement is Placement.HEADS else {}))
    outcomes = run_ranks(2, serve, job)
    expected = [greedy(llama, text, NUM_OUTPUT) for text in conversation()]
    check(outcomes, expected * 2)
    starts = [works[0].start for _, works in sorted(first_works(outcomes[0]).items())]
    assert starts[7:] == [(len(text) - 1) // 4 * 4 for text in conversation()]
    assert gap == 0 or starts[1] == 148


def test_few_new_tokens_attend_to_blocks_on_other_ranks(llama: Path) -> None:
    """Three ranks: the prefix lies on all of them, what is new on one."""
    document, ends = prompts((99, 30), seed=8)
    texts = [document, (*document, *ends[:6]), (*document, *ends)]
    requests = tuple(
        Request(text, sampling(NUM_OUTPUT), start_step=40 * at) for at, text in enumerate(texts)
    )
    outcomes = run_ranks(3, serve, Job(llama, requests))
    check(outcomes, [greedy(llama, text, NUM_OUTPUT) for text in texts])
    works = first_works(outcomes[0])
    assert [works[at][0].start for at in (1, 2)] == [96, 96]
    assert len({piece.rank for piece in works[1][0].slices}) == 1
    assert len({piece.rank for piece in works[2][0].slices}) == 3


@pytest.mark.parametrize("placement", list(Placement))
def test_preempted_sequences_share_and_restart(llama: Path, placement: Placement) -> None:
    document, *ends = prompts((40, 3, 9, 14), seed=9)
    texts = [(*document, *end) for end in ends]
    requests = tuple(Request(text, sampling(60), start_step=3 * i) for i, text in enumerate(texts))
    by_head = placement is Placement.HEADS
    changes = {**HEADS, "num_pages": 46} if by_head else {"num_pages": 24}
    outcomes = run_ranks(2, serve, Job(llama, requests, **changes))
    assert outcomes[0].num_preemptions > 0
    assert any(works[-1].start > 40 for works in first_works(outcomes[0]).values())
    check(outcomes, [greedy(llama, text, 60) for text in texts])


def test_sparse_prefill_behind_a_prefix(llama: Path) -> None:
    """From exact blocks and from its own, whole on one rank and over all, down to one tile."""
    document, ends = prompts((150, 90), seed=10)
    texts = [document, (*document, *ends), (*document, *ends, 5), (*document, 6), document]
    requests = tuple(
        Request(text, sampling(NUM_OUTPUT), attention=ALL, start_step=30 * at)
        for at, text in enumerate(texts)
    )
    requests = (replace(requests[0], attention=AttentionParams()), *requests[1:])
    outcomes = run_ranks(3, serve, Job(llama, requests))
    works = first_works(outcomes[0])
    assert [works[at][0].start for at in range(5)] == [0, 148, 240, 148, 148]
    check(outcomes, [greedy(llama, text, NUM_OUTPUT) for text in texts])


def test_exact_requests_do_not_read_sparse_kv(llama: Path) -> None:
    document = prompts((150,), seed=11)[0]
    near = AttentionParams(AttentionKind.CSA_DISTANCE, window_blocks=1)
    requests = tuple(
        Request(document, sampling(NUM_OUTPUT), attention=attention, start_step=30 * at)
        for at, attention in enumerate((near, AttentionParams(), near))
    )
    outcomes = run_ranks(2, serve, Job(llama, requests))
    works = first_works(outcomes[0])
    assert [works[at][0].start for at in range(3)] == [0, 0, 148]
    assert outcomes[0].outputs[1] == greedy(llama, document, NUM_OUTPUT)
