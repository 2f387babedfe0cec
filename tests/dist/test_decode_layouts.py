"""Decode over KV by token range, in the SP layout (queries travel) and the TP layout (Helix)."""

from dataclasses import replace
from pathlib import Path

import pytest

from csps.core.attention import AttentionKind, AttentionParams
from csps.core.plan import Lane, Layout
from tests.checkpoints import write_tiny
from tests.dist.ranks import Job, Request, run_ranks, serve
from tests.dist.test_parity import check, greedy, prompts, sampling

NUM_LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, ELEMENT_BYTES = 3, 96, 6, 3, 16, 4
IN_TURN = (Layout.SP, Layout.TP)
DECODE_ALONE = (Layout.TP,)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


def job(model: Path, texts: list[tuple[int, ...]], num_output: int, **changes: object) -> Job:
    return Job(model, tuple(Request(text, sampling(num_output)) for text in texts), **changes)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_layout_switches_at_every_step(llama: Path, num_ranks: int) -> None:
    """Prompts whole on a rank and over all; four ranks share three KV heads."""
    texts = prompts((3, 17, 90, 200))
    outcomes = run_ranks(num_ranks, serve, job(llama, texts, 20, decode_layouts=IN_TURN))
    check(outcomes, [greedy(llama, text, 20) for text in texts])
    decodes = {plan.layout for plan in outcomes[0].plans if plan.lane is Lane.DECODE}
    assert decodes == set(IN_TURN)


def test_with_tensor_parallel_rows(llama: Path) -> None:
    texts = prompts((40, 130), seed=1)
    outcomes = run_ranks(4, serve, job(llama, texts, 20, tp=2, decode_layouts=DECODE_ALONE))
    check(outcomes, [greedy(llama, text, 20) for text in texts])


@pytest.mark.parametrize("buckets", [(), (1, 4)])
def test_fewer_heads_than_ranks_of_a_row(tmp_path: Path, buckets: tuple[int, ...]) -> None:
    """One head for two ranks: one column has none, in prefill (sparse too) and both layouts."""
    one_head = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": HEAD_DIM}
    model = write_tiny("llama", tmp_path, **one_head)
    texts = prompts((9, 40, 330), seed=2)
    changes = {"tp": 2, "decode_layouts": IN_TURN, "stage_tokens": 96, "buckets": buckets}
    dense = job(model, texts, 8, **changes)
    exact = AttentionParams(AttentionKind.CSA, gamma=1.0)
    requests = (*dense.requests, Request(texts[2], sampling(8), attention=exact))
    outcomes = run_ranks(4, serve, replace(dense, requests=requests))
    check(outcomes, [greedy(model, text, 8) for text in (*texts, texts[2])])


def test_moves_what_the_formula_says(llama: Path) -> None:
    """Per token and layer: everyone's heads to P - 1 ranks, (o, lse) of the others' heads back."""
    size = 3
    outcomes = run_ranks(size, serve, job(llama, prompts((200,)), 10, decode_layouts=DECODE_ALONE))
    moved: dict[str, int] = {}
    for outcome in outcomes:
        for result in outcome.results:
            if result.lane is Lane.DECODE:
                for kind, num in result.stats.bytes_sent.items():
                    moved[kind] = moved.get(kind, 0) + num
    tokens = sum(plan.num_tokens for plan in outcomes[0].plans if plan.lane is Lane.DECODE)
    per_layer = tokens * NUM_LAYERS * (size - 1)
    query = HEADS * HEAD_DIM * ELEMENT_BYTES
    assert moved["query"] == per_layer * (query + 2 * KV_HEADS * HEAD_DIM * ELEMENT_BYTES)
    assert moved["partial"] == per_layer * (query + 4 * HEADS)
    assert moved["hidden"] == 2 * per_layer * 2 * HIDDEN * ELEMENT_BYTES
