"""Two machines' agents on one: ranks that deploy/torchrun.sh starts, and the loss of a machine."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from csps.bench.server import ServerProcess
from tests.e2e.harness import (
    NOT_SERVING,
    SERVING,
    Answer,
    Client,
    Watch,
    alive,
    assert_clean,
    eventually,
    free_port,
    prompt,
    request,
    tail,
)

SCRIPT = Path(__file__).parents[2] / "deploy/torchrun.sh"
TIMEOUT_S = 180.0


class Machine:
    """One torchrun agent and its rank, as deploy/torchrun.sh starts them."""

    def __init__(self, coordinator: str, node: int, port: int, log: Path) -> None:
        place = {"NNODES": "2", "NODE_RANK": str(node), "NPROC_PER_NODE": "1"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        place |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHON": sys.executable}
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [SCRIPT, coordinator, "--join-timeout", "60"],
                env=os.environ | place,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._agent = psutil.Process(self.process.pid)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def family(self) -> list[psutil.Process]:
        """The agent first, then its rank."""
        return [self._agent, *self._agent.children(recursive=True)]

    def kill(self) -> None:
        """As if the machine were gone: no signal that a process could answer."""
        for process in self.family():
            process.kill()
        self.process.wait(TIMEOUT_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()


@pytest.fixture
def cluster(tiny: Path, tmp_path: Path) -> Iterator[tuple[ServerProcess, list[Machine]]]:
    """A coordinator without ranks of its own, and two machines that have one each."""
    control = f"127.0.0.1:{free_port()}"
    server = ServerProcess(
        *("--model", str(tiny), "--workers", "0", "--ranks", "2", "--control", control),
        *("--dtype", "float32", "--block-size", "16", "--long-tokens", "128"),
        *("--threads-per-rank", "1", "--layout", "sp"),
    )
    server.start()
    port, machines = free_port(), []
    try:
        for node in range(2):
            machines.append(Machine(control, node, port, tmp_path / f"machine{node}"))
        yield server, machines
    finally:
        for machine in machines:
            machine.close()
        server.__exit__(None, None, None)


def test_two_machines_serve_until_one_is_lost(
    cluster: tuple[ServerProcess, list[Machine]],
) -> None:
    server, machines = cluster
    server.wait_ready()
    watch = Watch(server.target)
    client = Client(server.target)
    answer = client.generate(request(prompt(300), max_tokens=20, ignore_eos=True))
    assert len(answer.token_ids) == 20
    assert client.info().sp == 2
    assert client.info().lanes[0].bytes_sent["kv"] > 0, "the prompt spanned both machines"

    stream, partial = client.open(request(prompt(300), max_tokens=1500, ignore_eos=True)), Answer()
    while len(partial.token_ids) < 3:
        partial.take(next(stream))
    left = machines[0].family()
    rank = machines[1].family()[-1].pid
    begun = time.monotonic()
    machines[1].kill()
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert f"rank 1 (pid {rank} on " in caught.value.details()
    assert time.monotonic() - begun < 20.0
    assert eventually(lambda: watch.seen == [SERVING, NOT_SERVING]), watch.seen
    client.close()

    assert server.process.wait(TIMEOUT_S) == 1, tail(server.log)
    last = server.log.splitlines()[-1]
    assert last.startswith(f"error: rank 1 (pid {rank} on "), last
    assert last.endswith(" left"), last
    assert_clean(server.log)
    assert machines[0].process.wait(TIMEOUT_S) != 0, "torchrun says that its rank failed"
    assert not alive(left), tail(machines[0].log)
    assert "error: " in machines[0].log
