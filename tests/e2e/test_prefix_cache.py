"""The prefix cache as clients see it: the same answers, tokens that were not computed, counters."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from csps.v1 import generation_pb2 as pb
from tests.e2e.harness import Answer, Running, prompt, request, serve

FLAGS = ("--dtype", "float32", "--block-size", "16", "--long-tokens", "128")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    """The tiny model on two ranks; prompts of 256 tokens and more are prefilled sparsely."""
    flags = ("--attention", "csa", "--csa-min-tokens", "256")
    with serve("--model", str(tiny), "--workers", "2", *FLAGS, *flags) as running:
        yield running


def ask(server: Running, ids: list[int], num_output: int = 12, **attention: object) -> Answer:
    message = request(ids, max_tokens=num_output, ignore_eos=True)
    message.attention.CopyFrom(pb.AttentionParams(**attention))
    return server.generate(message)


def cached(answer: Answer) -> int:
    assert answer.complete is not None
    return answer.complete.usage.cached_tokens


def test_a_repeated_prompt_is_not_computed_again(server: Running) -> None:
    ids = prompt(200, seed=1)
    before = server.info()
    first, second = ask(server, ids), ask(server, ids)
    after = server.info()
    assert (cached(first), cached(second)) == (0, 192)
    assert first.token_ids == second.token_ids
    assert first.text == second.text
    lanes = [(old.tokens, new.tokens) for old, new in zip(before.lanes, after.lanes, strict=True)]
    assert lanes[0][1] - lanes[0][0] == 200 + 8
    assert after.prefix_cache.query_tokens == before.prefix_cache.query_tokens + 400
    assert after.prefix_cache.hit_tokens == before.prefix_cache.hit_tokens + 192
    # Prompt and output: 211 tokens have KV.
    assert after.prefix_cache.blocks == before.prefix_cache.blocks + 211 // 16
    assert not any(after.used_blocks_by_rank)


def test_the_next_turn_finds_the_answer(server: Running) -> None:
    ids = prompt(100, seed=2)
    answer = ask(server, ids, num_output=40)
    assert cached(ask(server, [*ids, *answer.token_ids, *prompt(20)])) == 139 // 16 * 16


def test_exact_requests_do_not_read_sparse_kv(server: Running) -> None:
    ids = prompt(400, seed=3)
    assert cached(ask(server, ids)) == 0
    assert cached(ask(server, ids, gamma=0.99)) == 0
    dense = ask(server, ids, kind=pb.ATTENTION_KIND_DENSE)
    assert cached(dense) == 0
    again = ask(server, ids, kind=pb.ATTENTION_KIND_DENSE)
    assert cached(again) == 384
    assert again.token_ids == dense.token_ids
    assert cached(ask(server, ids)) == 384


def test_submit_says_what_was_cached(server: Running, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 3)
    command = [
        *(sys.executable, "-m", "csps", "submit", "--target", server.target, "--raw"),
        *("--file", str(text), "--max-tokens", "2"),
    ]
    said = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        said.append(done.stderr)
    assert "cached" not in said[0]
    assert " cached), TTFT" in said[1]


def test_off_every_prompt_is_computed(tiny: Path) -> None:
    with serve("--model", str(tiny), *FLAGS, "--no-prefix-cache") as server:
        ids = prompt(100)
        assert [cached(ask(server, ids)) for _ in range(2)] == [0, 0]
        assert not server.info().HasField("prefix_cache")
