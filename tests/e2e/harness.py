"""Starts the real server for tests and talks to it over plain gRPC."""

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from csps.bench.server import ServerProcess
from csps.v1 import generation_pb2 as pb
from csps.v1 import generation_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
RPC_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
# Python shares connections between channels to one address; a test that closes one must not.
CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)
BAD_LOG = ("Traceback", "Task was destroyed", "never retrieved", "never awaited")


@dataclass
class Answer:
    """Everything one stream said."""

    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    progress: list[pb.Progress] = field(default_factory=list)
    complete: pb.Complete | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def take(self, response: pb.GenerateResponse) -> None:
        kind = response.WhichOneof("event")
        if kind == "progress":
            self.progress.append(response.progress)
        elif kind == "chunk":
            self.token_ids += response.chunk.token_ids
            self.pieces.append(response.chunk.text)
            self.logprobs += response.chunk.logprobs
        else:
            assert self.complete is None, "a stream has one Complete"
            self.complete = response.complete


class Client:
    """One connection to a server."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self.stub = generation_pb2_grpc.GenerationStub(self.channel)

    def open(self, request: pb.GenerateRequest, timeout: float = RPC_TIMEOUT_S) -> grpc.Call:
        return self.stub.Generate(request, timeout=timeout)

    def generate(self, request: pb.GenerateRequest, timeout: float = RPC_TIMEOUT_S) -> Answer:
        """The whole stream; grpc.RpcError if it ends with an error."""
        answer = Answer()
        for response in self.open(request, timeout):
            answer.take(response)
        assert answer.complete is not None, "a stream that ends well has a Complete"
        return answer

    def abort(self, request_id: str) -> None:
        self.stub.Abort(pb.AbortRequest(request_id=request_id), timeout=RPC_TIMEOUT_S)

    def model(self) -> pb.GetModelInfoResponse:
        return self.stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=RPC_TIMEOUT_S)

    def info(self) -> pb.GetServerInfoResponse:
        return self.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=RPC_TIMEOUT_S)

    def load(self) -> pb.GetLoadResponse:
        return self.stub.GetLoad(pb.GetLoadRequest(), timeout=RPC_TIMEOUT_S)

    def close(self) -> None:
        self.channel.close()


class Running(Client):
    """A server that is ready, a connection to it, and its ranks' processes."""

    def __init__(self, server: ServerProcess) -> None:
        super().__init__(server.target)
        self.server = server
        self.target = server.target
        self.ranks = psutil.Process(server.pid).children()

    @property
    def log(self) -> str:
        return self.server.log

    def signal(self, number: int) -> None:
        self.server.process.send_signal(number)

    def wait_exit(self, timeout: float = STOP_TIMEOUT_S) -> int:
        return self.server.process.wait(timeout)


class Watch(threading.Thread):
    """What health's Watch says, as it says it."""

    def __init__(self, target: str, service: str = "") -> None:
        super().__init__(daemon=True)
        self.seen: list[int] = []
        self.channel = grpc.insecure_channel(target)
        self._service = service
        self.start()

    def run(self) -> None:
        stub = health_pb2_grpc.HealthStub(self.channel)
        message = health_pb2.HealthCheckRequest(service=self._service)
        with contextlib.suppress(grpc.RpcError):
            for response in stub.Watch(message, timeout=RPC_TIMEOUT_S, wait_for_ready=True):
                self.seen.append(response.status)


@contextlib.contextmanager
def serve(*flags: str) -> Iterator[Running]:
    """A ready server, always ended; its log must hold no traceback, its ranks must be gone."""
    server = ServerProcess(*flags)
    server.start()
    ranks: list[psutil.Process] = []
    try:
        server.wait_ready()
        running = Running(server)
        ranks = running.ranks
        yield running
        running.close()
        server.stop()
        assert not alive(ranks), f"ranks outlive the server:\n{tail(server.log)}"
        assert_clean(server.log)
    except BaseException:
        print(tail(server.log))  # noqa: T201  (pytest shows it with the failure)
        raise
    finally:
        server.stop()
        for process in alive(ranks, timeout=0.0):
            process.kill()
        server.__exit__(None, None, None)


def alive(processes: Sequence[psutil.Process], timeout: float = 5.0) -> list[psutil.Process]:
    """Those that still run after `timeout` seconds."""
    return psutil.wait_procs(processes, timeout=timeout)[1]


def tail(log: str, num_chars: int = 6000) -> str:
    return log[-num_chars:]


def assert_clean(log: str) -> None:
    found = [text for text in BAD_LOG if text in log]
    assert not found, f"{found} in the log:\n{tail(log)}"


def request(
    ids: Sequence[int] = (),
    *,
    text: str | None = None,
    messages: Sequence[tuple[str, str]] | None = None,
    request_id: str = "",
    **sampling: object,
) -> pb.GenerateRequest:
    """A request with one of the three kinds of prompt; keywords are SamplingParams."""
    message = pb.GenerateRequest(request_id=request_id, sampling=pb.SamplingParams(**sampling))
    if text is not None:
        message.text = text
    elif messages is not None:
        message.messages.SetInParent()
        for role, content in messages:
            message.messages.messages.add(role=role, content=content)
    else:
        message.token_ids.SetInParent()
        message.token_ids.ids.extend(ids)
    return message


def prompt(num_tokens: int, seed: int = 0, vocab_size: int = 400) -> list[int]:
    """Random token ids, none of them special."""
    source = random.Random(f"{num_tokens} {seed}")
    return [source.randrange(3, vocab_size) for _ in range(num_tokens)]


def eventually(check: Callable[[], bool], timeout: float = 10.0) -> bool:
    """Whether `check` becomes true within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def is_idle(client: Client) -> bool:
    load, info = client.load(), client.info()
    busy = load.num_waiting or load.num_running or load.queued_tokens or load.kv_usage
    return not busy and not any(info.used_blocks_by_rank)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
