"""Sparse prefill as clients see it: chosen by flags and requests, reported with the answer."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from csps.v1 import generation_pb2 as pb
from tests.e2e.harness import Answer, Running, prompt, request, serve

LAYERS, KV_HEADS = 3, 3
LONG, MANY_STAGES = 700, 1500


@pytest.fixture(scope="module")
def sparse(tiny: Path) -> Iterator[Running]:
    """The tiny model on two ranks; prompts of 256 tokens and more are prefilled sparsely."""
    with serve(
        *("--model", str(tiny), "--workers", "2", "--dtype", "float32"),
        *("--block-size", "16", "--long-tokens", "128", "--stage-tokens", "512"),
        # Prompts are asked again in other ways: all of each is to be prefilled.
        *("--attention", "csa", "--csa-min-tokens", "256", "--no-prefix-cache"),
    ) as running:
        yield running


def ask(server: Running, num_tokens: int, **attention: object) -> Answer:
    message = request(prompt(num_tokens, seed=num_tokens), max_tokens=12, ignore_eos=True)
    message.attention.CopyFrom(pb.AttentionParams(**attention))
    return server.generate(message)


def test_a_long_prompt_says_what_was_approximated(sparse: Running) -> None:
    before = sparse.info()
    complete = ask(sparse, LONG).complete
    after = sparse.info()
    assert complete is not None
    report = complete.attention
    assert report.kind == pb.ATTENTION_KIND_CSA
    assert report.gamma == pytest.approx(0.95)
    assert 0 < report.density <= 1
    assert 0 < report.union_density <= 1
    assert 0.9 <= report.recall_low <= report.recall_mean <= report.recall_high <= 1
    assert report.recall_min <= report.recall_p5 <= 1
    assert report.num_probes > 0
    assert not report.heads
    assert (after.attention, after.csa_min_tokens) == ("csa", 256)
    assert after.csa_gamma == pytest.approx(0.95)
    assert after.sparse_requests == before.sparse_requests + 1
    assert after.sparse.num_probes == before.sparse.num_probes + report.num_probes
    lane = after.lanes[0]
    assert {"rows", "lse", "mass", "vote", "bitmap", "kv"} <= set(lane.bytes_sent)
    assert sum(lane.received_by_rank) == sum(lane.bytes_sent.values())


def test_a_short_prompt_is_dense(sparse: Running) -> None:
    complete = ask(sparse, 255).complete
    assert complete is not None
    assert not complete.HasField("attention")


def test_a_request_may_ask_for_dense(sparse: Running, two_ranks: Running) -> None:
    answer = ask(sparse, LONG, kind=pb.ATTENTION_KIND_DENSE)
    assert answer.complete is not None
    assert not answer.complete.HasField("attention")
    assert answer.token_ids == ask(two_ranks, LONG).token_ids


@pytest.mark.parametrize("num_tokens", [LONG, MANY_STAGES])
def test_gamma_1_is_dense(sparse: Running, two_ranks: Running, num_tokens: int) -> None:
    answer = ask(sparse, num_tokens, gamma=1.0)
    assert answer.complete is not None
    assert answer.complete.attention.density == 1.0
    assert answer.complete.attention.recall_mean == 1.0
    assert answer.token_ids == ask(two_ranks, num_tokens).token_ids


def test_every_head_of_every_step_on_request(sparse: Running) -> None:
    complete = ask(sparse, MANY_STAGES, gamma=0.7, report_heads=True).complete
    assert complete is not None
    heads = complete.attention.heads
    steps = 3  # of 512 tokens
    assert len(heads) == steps * LAYERS * KV_HEADS
    assert {(head.layer, head.head) for head in heads} == {
        (layer, head) for layer in range(LAYERS) for head in range(KV_HEADS)
    }
    dense = sum(head.gamma == 1.0 for head in heads)
    assert complete.attention.dense_share == pytest.approx(dense / len(heads))


def test_distance_is_measured_but_not_corrected(sparse: Running) -> None:
    answer = ask(sparse, LONG, kind=pb.ATTENTION_KIND_CSA_DISTANCE, window_blocks=4)
    assert answer.complete is not None
    report = answer.complete.attention
    assert report.kind == pb.ATTENTION_KIND_CSA_DISTANCE
    assert report.density < 0.7
    assert report.dense_share == 0
    assert report.recall_mean < 0.95


def test_submit_chooses_and_prints(sparse: Running, tmp_path: Path) -> None:
    text, out = tmp_path / "text", tmp_path / "out.json"
    text.write_text("It was a dark and stormy night. " * 30)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "csps", "submit", "--target", sparse.target, "--raw"),
            *("--file", str(text), "--max-tokens", "2", "--json", str(out)),
            *("--attention", "csa", "--gamma", "0.8", "--report-heads"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "csa: computed" in done.stderr
    written = json.loads(out.read_text())["attention"]
    assert written["gamma"] == pytest.approx(0.8)
    assert len(written["heads"]) % (LAYERS * KV_HEADS) == 0
    assert written["heads"]
