"""How a server ends: told to, killed, or because a rank was killed. Nothing may outlive it."""

import contextlib
import signal
import threading
import time
from pathlib import Path

import grpc
import psutil
import pytest

from csps.bench.server import ServerProcess
from tests.e2e.harness import (
    NOT_SERVING,
    SERVING,
    STOP_TIMEOUT_S,
    Answer,
    Client,
    Running,
    Watch,
    alive,
    assert_clean,
    eventually,
    free_port,
    prompt,
    request,
    serve,
    tail,
)


class Stream(threading.Thread):
    """A stream read in a thread of its own, until it ends."""

    def __init__(self, client: Client, num_tokens: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.answer = Answer()
        self.error: grpc.RpcError | None = None
        self._call = client.open(
            request(prompt(num_tokens, seed=seed), max_tokens=1000, ignore_eos=True)
        )
        self.start()

    def run(self) -> None:
        try:
            for response in self._call:
                self.answer.take(response)
        except grpc.RpcError as error:
            self.error = error


def flags(model: Path, *more: str, workers: int = 2) -> tuple[str, ...]:
    return (
        *("--model", str(model), "--workers", str(workers), "--dtype", "float32"),
        *("--block-size", "16", "--long-tokens", "128", *more),
    )


def live_streams(server: Running) -> list[Stream]:
    """Two streams that decode, one of them over both ranks, and one long prompt."""
    streams = [Stream(server, num_tokens, i) for i, num_tokens in enumerate((300, 20))]
    assert eventually(lambda: all(len(stream.answer.token_ids) > 3 for stream in streams), 60.0)
    return [*streams, Stream(server, 1000, 2)]


def port_is_free(port: int) -> bool:
    with contextlib.suppress(psutil.AccessDenied):
        return not any(
            c.laddr.port == port and c.status == psutil.CONN_LISTEN
            for c in psutil.net_connections("tcp")
        )
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_streams_and_ranks(tiny: Path, number: signal.Signals) -> None:
    port = free_port()
    with serve(*flags(tiny, "--port", str(port))) as server:
        assert server.target == f"127.0.0.1:{port}"
        watch = Watch(server.target)
        streams = live_streams(server)
        assert eventually(lambda: watch.seen == [SERVING])
        begun = time.monotonic()
        server.signal(number)
        assert eventually(lambda: watch.seen == [SERVING, NOT_SERVING], 2.0), watch.seen
        with pytest.raises(grpc.RpcError) as caught:
            server.generate(request([5], max_tokens=2))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.wait_exit() == 0, tail(server.log)
        assert time.monotonic() - begun < STOP_TIMEOUT_S
        for stream in streams:
            stream.join(5.0)
            assert stream.answer.complete or stream.error.code() in (
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.CANCELLED,
            ), stream.error
        assert not alive(server.ranks)
        assert port_is_free(port)


def test_a_signal_while_the_ranks_load_ends_them(tiny: Path) -> None:
    server = ServerProcess(*flags(tiny))
    server.start()
    try:
        process = psutil.Process(server.pid)
        assert eventually(lambda: len(process.children()) == 2, 30.0)
        ranks = process.children()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(STOP_TIMEOUT_S) == 0, server.log
        assert not alive(ranks)
        assert_clean(server.log)
    finally:
        server.__exit__(None, None, None)


def test_ranks_end_when_the_coordinator_is_killed(tiny: Path) -> None:
    with serve(*flags(tiny)) as server:
        streams = live_streams(server)
        server.signal(signal.SIGKILL)
        assert server.wait_exit() == -signal.SIGKILL
        assert not alive(server.ranks, timeout=10.0)
        for stream in streams:
            stream.join(5.0)
            assert stream.error.code() is grpc.StatusCode.UNAVAILABLE


def test_ranks_that_load_end_when_the_coordinator_is_killed(tiny: Path) -> None:
    server = ServerProcess(*flags(tiny))
    server.start()
    try:
        process = psutil.Process(server.pid)
        assert eventually(lambda: len(process.children()) == 2, 30.0)
        ranks = process.children()
        # One rank alone has joined and waits for the other, inside torch.
        ranks[1].suspend()
        assert eventually(lambda: "rank 0 joined" in server.log, 60.0), server.log
        server.process.kill()
        assert not alive(ranks[:1], timeout=10.0)
    finally:
        for rank in alive(ranks, timeout=0.0):
            rank.kill()
        server.__exit__(None, None, None)


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_killed_rank_ends_everything_with_its_name(tiny: Path, busy: bool) -> None:
    with serve(*flags(tiny)) as server:
        watch = Watch(server.target, "csps.v1.Generation")
        streams = live_streams(server) if busy else []
        assert eventually(lambda: watch.seen == [SERVING])
        begun = time.monotonic()
        server.ranks[1].kill()
        for stream in streams:
            stream.join(5.0)
            assert stream.error is not None, "a stream hangs"
            assert stream.error.code() is grpc.StatusCode.UNAVAILABLE
            assert "rank 1" in stream.error.details()
        if busy:
            assert time.monotonic() - begun < 5.0
        assert eventually(lambda: watch.seen == [SERVING, NOT_SERVING], 5.0), watch.seen
        assert server.wait_exit() == 1, tail(server.log)
        assert not alive(server.ranks)
        last = server.log.splitlines()[-1]
        assert last == "error: the process of rank 1 was killed by signal 9 (Killed)", last


def test_a_rank_killed_while_it_loads_ends_the_server(tiny: Path) -> None:
    server = ServerProcess(*flags(tiny))
    server.start()
    try:
        process = psutil.Process(server.pid)
        assert eventually(lambda: len(process.children()) == 2, 30.0)
        ranks = process.children()
        ranks[0].kill()
        assert server.process.wait(STOP_TIMEOUT_S) == 1, server.log
        assert not alive(ranks)
        assert "rank 0 was killed by signal 9" in server.log.splitlines()[-1]
        assert_clean(server.log)
    finally:
        server.__exit__(None, None, None)
