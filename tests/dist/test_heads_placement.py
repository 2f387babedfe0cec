"""KV sharded by head: N ranks against transformers on one, in every factorisation and layout."""

from pathlib import Path

import numpy as np
import pytest

from csps.core.plan import Layout, StepPlan
from csps.core.strategy import Placement
from tests.checkpoints import write_tiny
from tests.dist.ranks import Job, Outcome, Request, run_ranks, serve
from tests.dist.test_parity import check, greedy, prompts, sampling

NUM_LAYERS, HIDDEN, HEAD_DIM, ELEMENT_BYTES = 3, 96, 16, 4
MESHES = [(sp, size // sp) for size in (2, 3, 4) for sp in range(1, size + 1) if size % sp == 0]
IN_TURN = (Layout.SP, Layout.TP)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def nine_heads(tmp_path_factory) -> Path:
    """9 query and 3 KV heads, as the default model has."""
    path = tmp_path_factory.mktemp("tiny") / "nine"
    return write_tiny("llama", path, hidden_size=144, num_attention_heads=9)


def job(model: Path, texts: list[tuple[int, ...]], num_output: int = 20, **changes: object) -> Job:
    requests = tuple(
        Request(text, sampling(num_output), start_step=2 * i) for i, text in enumerate(texts)
    )
    return Job(model, requests, placement=Placement.HEADS, **changes)


@pytest.mark.parametrize(("sp", "tp"), MESHES)
def test_layout_switches_at_every_step(llama: Path, sp: int, tp: int) -> None:
    """Chunks and decodes of several requests, each step in the other layout than the last."""
    texts = prompts((1, 17, 130, 64))
    outcomes = run_ranks(sp * tp, serve, job(llama, texts, tp=tp, layouts=IN_TURN))
    check(outcomes, [greedy(llama, text, 20) for text in texts])
    assert {plan.layout for plan in outcomes[0].plans} == set(IN_TURN)


@pytest.mark.parametrize(("sp", "tp"), [(4, 1), (2, 2), (1, 4)])
def test_heads_that_no_number_of_ranks_divides(nine_heads: Path, sp: int, tp: int) -> None:
    """Two of four ranks share a KV head of the three; budgets that no chunk fits evenly."""
    texts = prompts((50, 7), seed=1)
    changes = {"tp": tp, "layouts": IN_TURN, "token_budget": 13}
    outcomes = run_ranks(4, serve, job(nine_heads, texts, **changes))
    check(outcomes, [greedy(nine_heads, text, 20) for text in texts])


@pytest.mark.parametrize("layout", list(Layout))
def test_fewer_heads_than_ranks(tmp_path: Path, layout: Layout) -> None:
    """Two query heads and one KV head on three ranks: one rank has no head at all."""
    model = write_tiny(
        "llama", tmp_path, num_attention_heads=2, num_key_value_heads=1, head_dim=HEAD_DIM
    )
    texts = prompts((40,), seed=2)
    outcomes = run_ranks(3, serve, job(model, texts, layouts=(layout,)))
    check(outcomes, [greedy(model, text, 20) for text in texts])


def test_preemption_recomputes(llama: Path) -> None:
    texts = prompts((40, 40, 40), seed=4)
    outcomes = run_ranks(2, serve, job(llama, texts, 60, num_pages=56, layouts=IN_TURN))
    assert outcomes[0].num_preemptions > 0
    check(outcomes, [greedy(llama, text, 60) for text in texts])


def test_every_factorisation_keeps_the_same_kv(llama: Path) -> None:
    """Rank (s, t) has head block t * sp + s, with the same bytes in the same pages."""
    texts = prompts((70, 33), seed=5)
    blocks = {}
    for sp, tp in ((4, 1), (2, 2), (1, 4)):
        changes = {"tp": tp, "layouts": IN_TURN, "num_pages": 60}
        outcomes = run_ranks(4, serve, job(llama, texts, 4, **changes))
        order = sorted(range(4), key=lambda rank: rank % tp * sp + rank // tp)
        blocks[sp, tp] = [outcomes[rank].kv for rank in order]
    first = blocks.pop((4, 1))
    for others in blocks.values():
        for ours, theirs in zip(first, others, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def sent(outcomes: list[Outcome], plan_filter: Layout) -> tuple[dict[str, int], list[StepPlan]]:
    """Bytes by kind over all ranks in steps of one layout, and those steps."""
    plans = outcomes[0].plans
    totals: dict[str, int] = {}
    for outcome in outcomes:
        for plan, result in zip(plans, outcome.results, strict=True):
            if plan.layout is plan_filter:
                for kind, num in result.stats.bytes_sent.items():
                    totals[kind] = totals.get(kind, 0) + num
    return totals, [plan for plan in plans if plan.layout is plan_filter]


def test_both_layouts_move_what_the_formulas_say(llama: Path) -> None:
    """Three ranks, one KV head each. SP: all-to-alls of (P - 1)/P (S/P)(2q + k) per rank and
    layer. TP: two all-reduces of 2 (P - 1)/P S E e, and the logits of sampled rows.
    """
    size, vocab = 3, 160
    outcomes = run_ranks(size, serve, job(llama, prompts((96, 60)), layouts=IN_TURN))
    query, kv = 6 * HEAD_DIM * ELEMENT_BYTES, 2 * 3 * HEAD_DIM * ELEMENT_BYTES
    totals, plans = sent(outcomes, Layout.SP)
    rows = {plan.step_id: [plan.num_tokens * r // size for r in range(size + 1)] for plan in plans}
    # What a rank sends of its rows in is what comes back of its heads: per row the same.
    per_row = NUM_LAYERS * (size - 1) * (query + kv + query) // size
    assert totals == {"ulysses": sum(bounds[-1] for bounds in rows.values()) * per_row}
    totals, plans = sent(outcomes, Layout.TP)
    num_tokens = sum(plan.num_tokens for plan in plans)
    reduced = [2 * (size - 1) * plan.num_tokens * HIDDEN * ELEMENT_BYTES // size for plan in plans]
    num_sampled = sum(work.sample for plan in plans for work in plan.work)
    width = -(-vocab // size)
    assert num_tokens
    assert totals == {
        "hidden": 2 * NUM_LAYERS * size * sum(reduced),
        "logits": (size - 1) * num_sampled * width * 4,
    }
