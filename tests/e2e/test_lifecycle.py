"""Streams that end in every way there is, at any moment: nothing may be left behind."""

import contextlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest

from csps.v1 import generation_pb2 as pb
from tests.e2e.harness import Client, Running, eventually, is_idle, prompt, request, serve

NUM_STREAMS = 100  # a round; there are two
NUM_AT_ONCE = 24
PROMPT_TOKENS = (3, 40, 127, 128, 300, 700)  # from 128 on a prompt spans both ranks
MAX_DELAY_S = 1.0
# Allocators and caches may still grow a little; a leak of a round's KV would not hide here.
RSS_SLACK_BYTES = 24 * 2**20


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    with serve(
        *("--model", str(tiny), "--workers", "2", "--dtype", "float32"),
        *("--block-size", "16", "--long-tokens", "128", "--stage-tokens", "256"),
        *("--kv-memory", "8MiB", "--max-running", "16"),
    ) as running:
        yield running


def one_stream(server: Running, number: int) -> str:
    """Open a stream and let it end in one of five ways; what the client saw."""
    source = random.Random(number)
    num_tokens = source.randrange(5, 60)
    message = request(
        prompt(source.choice(PROMPT_TOKENS), seed=number),
        request_id=f"churn-{number}",
        max_tokens=num_tokens,
        ignore_eos=True,
    )
    way = source.choice(["run", "cancel", "abort", "deadline", "close"])
    delay = source.uniform(0.0, MAX_DELAY_S)
    client = Client(server.target) if way == "close" else server
    if way == "deadline":
        call = client.open(message, timeout=max(delay, 0.01))
    else:
        call = client.open(message)
    try:
        if way in ("cancel", "close"):
            time.sleep(delay)
            call.cancel() if way == "cancel" else client.close()
        elif way == "abort":
            time.sleep(delay)
            abort_if_live(server, message.request_id)
        *_, last = call
        assert last.HasField("complete")
        if last.complete.finish_reason == pb.FINISH_REASON_ABORT:
            assert way == "abort"
            return "aborted"
        assert last.complete.usage.output_tokens == num_tokens
        return "complete"
    except grpc.RpcError as error:
        return error.code().name


def abort_if_live(server: Running, request_id: str) -> None:
    with contextlib.suppress(grpc.RpcError):
        server.abort(request_id)


def round_of_streams(server: Running) -> Counter[str]:
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        ends = Counter(pool.map(lambda number: one_stream(server, number), range(NUM_STREAMS)))
    assert eventually(lambda: is_idle(server)), (server.load(), server.info())
    return ends


def rss(server: Running) -> list[int]:
    """Bytes of the coordinator and of each rank."""
    processes = [psutil.Process(server.server.pid), *server.ranks]
    return [process.memory_info().rss for process in processes]


def num_threads(server: Running) -> int:
    return psutil.Process(server.server.pid).num_threads()


def test_hundreds_of_streams_leave_nothing_behind(server: Running) -> None:
    ends = round_of_streams(server)  # also fills every cache
    assert set(ends) == {"complete", "aborted", "CANCELLED", "DEADLINE_EXCEEDED"}, ends
    before, threads = rss(server), num_threads(server)
    ends = round_of_streams(server)
    assert set(ends) == {"complete", "aborted", "CANCELLED", "DEADLINE_EXCEEDED"}, ends
    after = rss(server)
    grown = [b - a for a, b in zip(before, after, strict=True)]
    assert max(grown) < RSS_SLACK_BYTES, grown
    assert num_threads(server) <= threads + 2
    assert psutil.Process(server.server.pid).children() == server.ranks
    assert len(server.generate(request(prompt(300), max_tokens=5, ignore_eos=True)).token_ids) == 5


def test_cancel_during_prefill_frees_the_blocks(server: Running) -> None:
    call = server.open(request(prompt(1900), max_tokens=100))
    next(call)
    assert eventually(lambda: sum(server.info().used_blocks_by_rank) > 0)
    call.cancel()
    assert eventually(lambda: is_idle(server))


def test_cancel_while_queued(server: Running) -> None:
    """More streams than --max-running: those that wait are cancelled, the others run on."""
    calls = [
        server.open(request(prompt(20, seed=i), max_tokens=100, ignore_eos=True)) for i in range(24)
    ]
    queued = [next(call).progress.queued for call in calls]
    assert all(queued)
    assert eventually(lambda: server.load().num_waiting >= 4)
    for call in calls[16:]:
        call.cancel()
    assert eventually(lambda: server.load().num_waiting == 0)
    for call in calls[:16]:
        *_, last = call
        assert last.complete.usage.output_tokens == 100
    assert eventually(lambda: is_idle(server))


def test_a_deadline_ends_the_request(server: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        server.generate(request(prompt(40), max_tokens=1900, ignore_eos=True), timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert eventually(lambda: is_idle(server))


def test_abort_ends_a_stream_that_nobody_reads(server: Running) -> None:
    """Its responses fill the connection's window, so the server cannot even send the end."""
    client = Client(server.target)
    message = request(
        prompt(10), request_id="unread", max_tokens=1900, ignore_eos=True, logprobs=20
    )
    call = client.open(message)
    next(call)
    assert eventually(lambda: server.load().num_running == 1)
    time.sleep(0.5)
    server.abort("unread")
    assert eventually(lambda: is_idle(server))
    responses = list(call)
    assert responses[-1].complete.finish_reason == pb.FINISH_REASON_ABORT
    assert responses[-1].complete.usage.output_tokens < 1900
    client.close()


def test_an_id_is_free_again_once_its_stream_has_ended(server: Running) -> None:
    for _ in range(20):
        message = request(prompt(5), request_id="again", max_tokens=2, ignore_eos=True)
        assert len(server.generate(message).token_ids) == 2
