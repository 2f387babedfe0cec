"""Sampling as a client sees it: repeatable, exact, and the text is that of the tokens."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from csps.checkpoint.locate import DEFAULT_MODEL, locate
from csps.checkpoint.tokenizer import Tokenizer, load_tokenizer
from csps.v1 import generation_pb2 as pb
from tests.e2e.harness import Running, eventually, is_idle, prompt, request, serve

KV_TOKENS = 640
KV_BYTES_PER_TOKEN = 2 * 3 * 3 * 16 * 4  # K and V, layers, heads, head dimension, fp32
RANDOM = {"temperature": 1.0, "top_p": 0.95, "top_k": 100, "ignore_eos": True}
LONG = prompt(300)  # over both ranks of `two_ranks`


@pytest.fixture(scope="module")
def one_rank(tiny: Path) -> Iterator[Running]:
    """The model of `two_ranks` on one rank, with KV for a few streams only."""
    with serve(
        *("--model", str(tiny), "--workers", "1", "--dtype", "float32", "--block-size", "16"),
        *("--kv-memory", f"{KV_TOKENS * KV_BYTES_PER_TOKEN}B"),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def real() -> Iterator[Running]:
    """The default model."""
    with serve("--workers", "1", "--max-model-len", "1024") as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(locate(DEFAULT_MODEL))


def together(server: Running, messages: list[pb.GenerateRequest]) -> list[list[int]]:
    with ThreadPoolExecutor(len(messages)) as pool:
        return [answer.token_ids for answer in pool.map(server.generate, messages)]


def test_a_seed_repeats_alone_in_a_batch_and_on_any_number_of_ranks(
    two_ranks: Running, one_rank: Running
) -> None:
    messages = [request(LONG, max_tokens=40, seed=seed, **RANDOM) for seed in range(3)]
    alone = [two_ranks.generate(message).token_ids for message in messages]
    others = [request(prompt(50 * i), max_tokens=30, seed=i, **RANDOM) for i in range(1, 5)]
    assert together(two_ranks, [*messages, *others])[:3] == alone
    assert [one_rank.generate(message).token_ids for message in messages] == alone
    assert len({tuple(tokens) for tokens in alone}) == 3, "seeds make no difference"


def test_without_a_seed_every_request_draws_its_own(two_ranks: Running) -> None:
    message = request(LONG, max_tokens=20, **RANDOM)
    first, second = (two_ranks.generate(message).token_ids for _ in range(2))
    assert first != second


def test_top_k_1_is_greedy(two_ranks: Running) -> None:
    greedy = two_ranks.generate(request(LONG, max_tokens=40, ignore_eos=True)).token_ids
    for values in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-9}):
        sampling = {"temperature": 5.0, "seed": 3, **values}
        message = request(LONG, max_tokens=40, ignore_eos=True, **sampling)
        assert two_ranks.generate(message).token_ids == greedy, values


def test_streams_that_are_preempted_lose_nothing(two_ranks: Running, one_rank: Running) -> None:
    """Six streams grow to 960 tokens where KV holds 640."""
    messages = [
        *(request(prompt(40, seed=i), max_tokens=120, ignore_eos=True) for i in range(5)),
        request(prompt(40, seed=5), max_tokens=120, seed=5, min_tokens=100, **RANDOM),
    ]
    before = one_rank.info()
    tight = together(one_rank, messages)
    after = one_rank.info()
    prefilled = after.lanes[0].tokens - before.lanes[0].tokens
    assert prefilled > 6 * 40, "nothing was preempted"
    assert tight == [two_ranks.generate(message).token_ids for message in messages]
    assert eventually(lambda: is_idle(one_rank))


def test_max_tokens_and_context_end_with_length(one_rank: Running) -> None:
    for num_tokens in (1, 2, 17):
        answer = one_rank.generate(request(prompt(30), max_tokens=num_tokens, ignore_eos=True))
        assert len(answer.token_ids) == num_tokens == answer.complete.usage.output_tokens
        assert answer.complete.finish_reason == pb.FINISH_REASON_LENGTH
    answer = one_rank.generate(request(prompt(600), ignore_eos=True))
    assert answer.complete.finish_reason == pb.FINISH_REASON_LENGTH
    assert 600 + len(answer.token_ids) == KV_TOKENS + 1, "one token's KV is never needed"


def test_stop_tokens_and_min_tokens(two_ranks: Running) -> None:
    greedy = two_ranks.generate(request(LONG, max_tokens=40, ignore_eos=True)).token_ids
    stop_id = greedy[7]
    first = greedy.index(stop_id)
    stopped = two_ranks.generate(
        request(LONG, max_tokens=40, ignore_eos=True, stop_token_ids=[stop_id])
    )
    assert stopped.token_ids == greedy[: first + 1]
    assert stopped.complete.finish_reason == pb.FINISH_REASON_STOP
    late = two_ranks.generate(
        request(LONG, max_tokens=40, ignore_eos=True, stop_token_ids=[stop_id], min_tokens=20)
    )
    assert len(late.token_ids) >= 20
    assert stop_id not in late.token_ids[:20]
    assert late.token_ids[:first] == greedy[:first]


def test_logprobs_of_greedy_tokens(two_ranks: Running) -> None:
    for num_top in (0, 1, 20):
        answer = two_ranks.generate(request(LONG, max_tokens=10, ignore_eos=True, logprobs=num_top))
        assert len(answer.logprobs) == 10
        for token_id, entry in zip(answer.token_ids, answer.logprobs, strict=True):
            assert entry.logprob <= 0.0
            assert len(entry.top) == num_top
            logprobs = [top.logprob for top in entry.top]
            assert logprobs == sorted(logprobs, reverse=True)
            if num_top:
                assert (entry.top[0].token_id, entry.top[0].logprob) == (token_id, entry.logprob)


def test_end_of_sequence(real: Running) -> None:
    messages = [("user", "Say hello in one short sentence.")]
    ended = real.generate(request(messages=messages, max_tokens=200))
    assert ended.complete.finish_reason == pb.FINISH_REASON_STOP
    eos = set(real.model().eos_token_ids)
    assert ended.token_ids[-1] in eos
    assert not eos & set(ended.token_ids[:-1])
    assert "<|im_end|>" not in ended.text
    longer = real.generate(
        request(messages=messages, max_tokens=len(ended.token_ids) + 5, ignore_eos=True)
    )
    assert longer.token_ids[: len(ended.token_ids)] == ended.token_ids
    assert len(longer.token_ids) == len(ended.token_ids) + 5


COPIES = {
    "emoji": "🙂🚀👍🎉🐍\n" * 12,
    "chinese": "你好，世界。今天天气很好，我们去公园散步吧。\n" * 8,
    "english": "The quick brown fox jumps over the lazy dog.\n" * 8,
}


@pytest.mark.parametrize("name", COPIES)
def test_streamed_text_is_that_of_the_tokens(
    real: Running, tokenizer: Tokenizer, name: str
) -> None:
    """The model copies its prompt, whose characters take several tokens each."""
    answer = real.generate(request(text=COPIES[name], max_tokens=60, ignore_eos=True))
    assert answer.text == tokenizer.decode(answer.token_ids)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(answer.pieces[:-1])
    if name != "english":
        assert sum(ord(char) > 0x2000 for char in answer.text) > 5, answer.text
        assert "" in answer.pieces, "no token was held back: nothing was tested"


def test_stop_strings_across_tokens(real: Running) -> None:
    text = COPIES["english"]
    full = real.generate(request(text=text, max_tokens=40, ignore_eos=True))
    # From the middle of a token to the middle of a later one.
    at = full.text.index("fox jumps") + 1
    stop = full.text[at : at + 6]
    stopped = real.generate(
        request(text=text, max_tokens=40, ignore_eos=True, stop=["never seen", stop])
    )
    assert stopped.text == full.text[: full.text.index(stop)]
    assert stopped.complete.finish_reason == pb.FINISH_REASON_STOP
    assert stopped.token_ids == full.token_ids[: len(stopped.token_ids)]
    assert stopped.complete.usage.output_tokens == len(stopped.token_ids)
    beginning = real.generate(
        request(text=text, max_tokens=40, ignore_eos=True, stop=[stop + " never goes on like that"])
    )
    assert beginning.text == full.text, "what only began like a stop string was lost"
    assert eventually(lambda: is_idle(real))
