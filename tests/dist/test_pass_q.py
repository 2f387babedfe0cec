"""Late stages of a long prompt, where queries are fewer bytes than the KV before them."""

from pathlib import Path

import pytest

from csps.core.plan import Lane
from tests.checkpoints import write_tiny
from tests.dist.ranks import Job, Outcome, Request, run_ranks, serve
from tests.dist.test_parity import check, greedy, prompts, sampling

NUM_LAYERS, HEADS, KV_HEADS, HEAD_DIM, ELEMENT_BYTES = 3, 6, 3, 16, 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


def prefill_bytes(outcomes: list[Outcome]) -> list[dict[str, int]]:
    """By prefill step: bytes by kind, of all ranks together."""
    steps = []
    for results in zip(*(outcome.results for outcome in outcomes), strict=True):
        if results[0].lane is Lane.PREFILL:
            total: dict[str, int] = {}
            for result in results:
                for kind, num in result.stats.bytes_sent.items():
                    total[kind] = total.get(kind, 0) + num
            steps.append(total)
    return steps


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_stages_go_the_cheaper_way(llama: Path, num_ranks: int) -> None:
    """Stages of 48 tokens: 2 q new rows against S k of KV turns the ring into pass-Q."""
    texts = prompts((330,), seed=8)
    job = Job(llama, (Request(texts[0], sampling(8)),), stage_tokens=48)
    outcomes = run_ranks(num_ranks, serve, job)
    check(outcomes, [greedy(llama, texts[0], 8)])
    query_row = HEADS * HEAD_DIM * ELEMENT_BYTES
    kv_token = 2 * KV_HEADS * HEAD_DIM * ELEMENT_BYTES
    plans = [plan for plan in outcomes[0].plans if plan.lane is Lane.PREFILL]
    ways = set()
    for plan, moved in zip(plans, prefill_bytes(outcomes), strict=True):
        (work,) = plan.work
        ring = NUM_LAYERS * (num_ranks - 1) * work.stop * kv_token
        most = NUM_LAYERS * (num_ranks - 1) * work.num_tokens * (2 * query_row + 4 * HEADS)
        ways.add(tuple(sorted(moved)))
        assert sum(moved.values()) <= min(ring, most)
        if set(moved) == {"kv"}:
            assert moved["kv"] == ring
    assert ways == {("kv",), ("partial", "query")}


def test_beside_short_and_ring_prompts(llama: Path) -> None:
    """One step holds prompts that stay whole, go round the ring, and ship their queries."""
    texts = prompts((250, 9, 60, 14), seed=9)
    requests = tuple(Request(text, sampling(8), start_step=i) for i, text in enumerate(texts))
    outcomes = run_ranks(3, serve, Job(llama, requests, stage_tokens=48))
    check(outcomes, [greedy(llama, text, 8) for text in texts])
