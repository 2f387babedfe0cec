"""What a client can send wrong: its status, a message that helps, and no harm to others."""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from csps.v1 import generation_pb2 as pb
from tests.e2e.harness import RPC_TIMEOUT_S, Client, Running, is_idle, prompt, request, serve

INVALID = grpc.StatusCode.INVALID_ARGUMENT
GENERATE = "/csps.v1.Generation/Generate"
ABORT = "/csps.v1.Generation/Abort"
CONTEXT = 2048
KV_TOKENS = 1024
MAX_WAITING = 600
KV_BYTES_PER_TOKEN = 2 * 3 * 3 * 16 * 4  # K and V, layers, heads, head dimension, fp32

QUIET = request(prompt(20, seed=7), max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def server(tiny_chat: Path) -> Iterator[Running]:
    with serve(
        *("--model", str(tiny_chat), "--workers", "1", "--dtype", "float32"),
        *("--block-size", "16", "--kv-memory", f"{KV_TOKENS * KV_BYTES_PER_TOKEN}B"),
        *("--max-running", "3", "--max-waiting-tokens", str(MAX_WAITING)),
    ) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def undisturbed(server: Running) -> Iterator[None]:
    """Streams that run all the while; in the end their tokens must be those of a quiet run."""
    quiet = server.generate(QUIET).token_ids
    over = threading.Event()

    def keep_running() -> int:
        client, num_runs = Client(server.target), 0
        while not over.is_set():
            assert client.generate(QUIET).token_ids == quiet, "another request changed a stream"
            num_runs += 1
        client.close()
        return num_runs

    with ThreadPoolExecutor(1) as pool:
        runs = pool.submit(keep_running)
        yield
        over.set()
        assert runs.result(timeout=RPC_TIMEOUT_S) > 0
    assert is_idle(server)


def refused(server: Running, message: pb.GenerateRequest) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        server.generate(message)
    return caught.value


PROMPTS = {
    "no prompt": (pb.GenerateRequest(), ["prompt", "text, token_ids and messages"]),
    "empty text": (request(text=""), ["prompt", "empty", "at least one token"]),
    "no ids": (request([]), ["prompt", "empty", "at least one token"]),
    "no messages": (request(messages=[]), ["messages", "empty"]),
    "id outside the vocabulary": (request([5, 400]), ["token_ids", "400", "[0, 400)"]),
    "largest id": (request([5, 2**32 - 1]), ["token_ids", "4294967295", "[0, 400)"]),
    "over context": (request(prompt(CONTEXT)), ["prompt", "2048"]),
    "far over context": (request([7] * 3_000_000), ["prompt", "3000000", "2048"]),
    "text over context": (request(text="q#z~" * 1500), ["prompt", "2048"]),
    "text far over context": (request(text="x" * 200_000), ["text", "200000", "131072"]),
    "never fits KV": (request(prompt(1500)), ["prompt", "1501", "KV", "1024"]),
    "prompt and output over context": (
        request(prompt(100), max_tokens=CONTEXT - 99),
        ["max_tokens", "100", "1949", "2048"],
    ),
    "unknown role": (request(messages=[("wizard", "hi")]), ["messages", "role", "wizard", "user"]),
    "other model": (
        pb.GenerateRequest(model="gpt-x", text="hi"),
        ["model", "'gpt-x'", "'tiny-chat'"],
    ),
    "long request id": (request([5], request_id="r" * 129), ["request_id", "128", "129"]),
}

SAMPLING = {
    "temperature -0.1": ({"temperature": -0.1}, ["temperature", "[0, 100]", "-0.1"]),
    "temperature 101": ({"temperature": 101.0}, ["temperature", "[0, 100]"]),
    "temperature nan": ({"temperature": math.nan}, ["temperature", "[0, 100]", "nan"]),
    "temperature inf": ({"temperature": math.inf}, ["temperature", "[0, 100]", "inf"]),
    "top_p 0": ({"top_p": 0.0}, ["top_p", "(0, 1]"]),
    "top_p nan": ({"top_p": math.nan}, ["top_p", "(0, 1]", "nan"]),
    "top_p 1.5": ({"top_p": 1.5}, ["top_p", "(0, 1]", "1.5"]),
    "top_k -1": ({"top_k": -1}, ["top_k", "at least 0", "-1"]),
    "max_tokens 0": ({"max_tokens": 0}, ["max_tokens", "at least 1", "0"]),
    "max_tokens -5": ({"max_tokens": -5}, ["max_tokens", "at least 1", "-5"]),
    "min_tokens -1": ({"min_tokens": -1}, ["min_tokens", "at least 0", "-1"]),
    "min over max": ({"min_tokens": 6, "max_tokens": 5}, ["min_tokens", "max_tokens 5", "6"]),
    "many stops": ({"stop": ["a"] * 17}, ["stop", "16", "17"]),
    "empty stop": ({"stop": ["a", ""]}, ["stop", "1 to 256", "0"]),
    "long stop": ({"stop": ["a" * 257]}, ["stop", "1 to 256", "257"]),
    "many stop ids": ({"stop_token_ids": [5] * 65}, ["stop_token_ids", "64", "65"]),
    "unknown stop id": ({"stop_token_ids": [400]}, ["stop_token_ids", "400", "[0, 400)"]),
    "logprobs 21": ({"logprobs": 21}, ["logprobs", "[0, 20]", "21"]),
    "logprobs -1": ({"logprobs": -1}, ["logprobs", "[0, 20]", "-1"]),
    "prompt_logprobs 4097": (
        {"prompt_logprobs": 4097},
        ["prompt_logprobs", "[1, 4096]", "4097"],
    ),
    "prompt_logprobs 0": ({"prompt_logprobs": 0}, ["prompt_logprobs", "[1, 4096]", "0"]),
    "prompt_logprobs -1": ({"prompt_logprobs": -1}, ["prompt_logprobs", "[1, 4096]", "-1"]),
    "seed -1": ({"seed": -1}, ["seed", "[0, 2^63)", "-1"]),
}

ATTENTION = {
    "unknown kind": ({"kind": 99}, ["attention.kind", "99"]),
    "gamma 0": ({"gamma": 0.0}, ["attention.gamma", "(0, 1]", "0.0"]),
    "gamma 1.5": ({"gamma": 1.5}, ["attention.gamma", "(0, 1]", "1.5"]),
    "gamma nan": ({"gamma": math.nan}, ["attention.gamma", "(0, 1]", "nan"]),
    "window 0": ({"window_blocks": 0}, ["attention.window_blocks", "[1, 65536]", "0"]),
    "window 65537": ({"window_blocks": 65_537}, ["attention.window_blocks", "65536", "65537"]),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_bad_prompt(server: Running, name: str) -> None:
    message, needles = PROMPTS[name]
    error = refused(server, message)
    assert error.code() is INVALID, error
    assert [text for text in needles if text not in error.details()] == [], error.details()


@pytest.mark.parametrize("name", SAMPLING)
def test_bad_sampling(server: Running, name: str) -> None:
    values, needles = SAMPLING[name]
    error = refused(server, request([5, 6, 7], **values))
    assert error.code() is INVALID, error
    assert [text for text in needles if text not in error.details()] == [], error.details()


@pytest.mark.parametrize("name", ATTENTION)
def test_bad_attention(server: Running, name: str) -> None:
    values, needles = ATTENTION[name]
    message = request([5, 6, 7])
    message.attention.MergeFrom(pb.AttentionParams(**values))
    error = refused(server, message)
    assert error.code() is INVALID, error
    assert [text for text in needles if text not in error.details()] == [], error.details()


def test_messages_without_a_template(two_ranks: Running) -> None:
    error = refused(two_ranks, request(messages=[("user", "hi")]))
    assert error.code() is INVALID
    assert "chat template" in error.details()
    assert not two_ranks.model().has_chat_template


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x1a\x02\xff\xfe", id="text is not UTF-8"),
        pytest.param(b"\x0a\x01\xc0\x1a\x01a", id="request_id is not UTF-8"),
        pytest.param(b"\x1a\x01a\x32\x04\x32\x02\xed\xa0", id="stop is not UTF-8"),
        pytest.param(b"\xff\xff\xff\xff", id="garbage"),
        pytest.param(b"\x1a\x7fabc", id="cut short"),
    ],
)
def test_bytes_that_are_no_request(server: Running, data: bytes) -> None:
    stream = server.channel.unary_stream(GENERATE, bytes, bytes)
    with pytest.raises(grpc.RpcError) as caught:
        list(stream(data, timeout=RPC_TIMEOUT_S))
    assert caught.value.code() is INVALID, caught.value
    assert "UTF-8" in caught.value.details()


def test_abort_bytes_that_are_no_request(server: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        server.channel.unary_unary(ABORT, bytes, bytes)(b"\x0a\x02\xff\xfe", timeout=RPC_TIMEOUT_S)
    assert caught.value.code() is INVALID


def test_unknown_fields_are_ignored(server: Running) -> None:
    """A newer client may send more than this server knows."""
    data = request([5, 6, 7], max_tokens=2).SerializeToString() + b"\xfa\x3f\x03abc"
    stream = server.channel.unary_stream(GENERATE, bytes, pb.GenerateResponse.FromString)
    *_, last = stream(data, timeout=RPC_TIMEOUT_S)
    assert last.complete.usage.prompt_tokens == 3


def test_unknown_method(server: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        server.channel.unary_unary("/csps.v1.Generation/Nope", bytes, bytes)(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_abort_of_an_unknown_request(server: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        server.abort("nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "request_id" in caught.value.details()
    assert "'nobody'" in caught.value.details()


def test_a_live_request_id_is_taken_until_its_stream_ends(server: Running) -> None:
    message = request(prompt(10), request_id="twice", max_tokens=400, ignore_eos=True)
    call = server.open(message)
    assert next(call).request_id == "twice"
    error = refused(server, message)
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert "'twice'" in error.details()
    server.abort("twice")
    assert list(call)[-1].complete.finish_reason == pb.FINISH_REASON_ABORT
    again = server.generate(request(prompt(10), request_id="twice", max_tokens=3, ignore_eos=True))
    assert len(again.token_ids) == 3


def test_a_full_queue_says_when_to_come_back(server: Running) -> None:
    def go(seed: int) -> grpc.RpcError | int:
        message = request(prompt(250, seed=seed), max_tokens=80, ignore_eos=True)
        try:
            return len(server.generate(message).token_ids)
        except grpc.RpcError as error:
            return error

    with ThreadPoolExecutor(12) as pool:
        ends = list(pool.map(go, range(12)))
    errors = [end for end in ends if not isinstance(end, int)]
    assert errors, "12 prompts of 250 tokens and a queue of 600 tokens"
    assert all(end == 80 for end in ends if isinstance(end, int))
    for error in errors:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error
        assert str(MAX_WAITING) in error.details()
        assert int(dict(error.trailing_metadata())["retry-after"]) > 0


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1e-40},
        {"temperature": 1e-6},
        {"temperature": 100.0},
        {"temperature": 1.0, "top_p": 1e-40},
        {"temperature": 1.0, "top_k": 2**31 - 1},
        {"temperature": 1.0, "seed": 2**63 - 1},
        {"logprobs": 20},
        {"stop_token_ids": list(range(64)), "min_tokens": 5},
    ],
    ids=str,
)
def test_extremes_within_the_limits(server: Running, values: dict[str, object]) -> None:
    answer = server.generate(request([5, 6, 7], max_tokens=5, ignore_eos=True, **values))
    assert len(answer.token_ids) == 5
