"""Ranks that torchrun starts and that join a waiting server."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from csps.bench.server import ServerProcess
from tests.e2e.harness import Client, alive, assert_clean, eventually, free_port, prompt, request

TIMEOUT_S = 120.0


class Torchrun:
    """`torchrun -m csps worker` on this machine; ended with its ranks."""

    def __init__(self, coordinator: str, num_ranks: int) -> None:
        launch = ["--nproc-per-node", str(num_ranks), "--master-port", str(free_port())]
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", *launch),
                *("-m", "csps", "worker", "--coordinator", coordinator, "--join-timeout", "30"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self) -> tuple[int, str]:
        log, _ = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, log

    def __enter__(self) -> "Torchrun":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.terminate()
            for process in alive(family):
                process.kill()
            self.process.communicate(timeout=TIMEOUT_S)


@pytest.fixture
def waiting(tiny: Path) -> ServerProcess:
    """A server that waits for two ranks; its control address in `control`."""
    control = f"127.0.0.1:{free_port()}"
    server = ServerProcess(
        *("--model", str(tiny), "--workers", "0", "--ranks", "2", "--control", control),
        *("--dtype", "float32", "--block-size", "16", "--long-tokens", "128"),
    )
    server.control = control
    server.start()
    yield server
    server.__exit__(None, None, None)


def test_torchrun_ranks_serve_and_leave(waiting: ServerProcess) -> None:
    assert eventually(lambda: waiting.control in waiting.log, TIMEOUT_S)
    with Torchrun(waiting.control, 2) as ranks:
        waiting.wait_ready()
        client = Client(waiting.target)
        answer = client.generate(request(prompt(300), max_tokens=20, ignore_eos=True))
        assert len(answer.token_ids) == 20
        client.close()
        assert waiting.stop() == 0
        status, log = ranks.wait()
        assert status == 0, log
        assert_clean(log)
    assert_clean(waiting.log)


def worker(*flags: str) -> tuple[int, str]:
    """Status and last line of one rank that is started by hand."""
    command = [sys.executable, "-m", "csps", "worker", *flags]
    end = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    return end.returncode, end.stderr.splitlines()[-1]


def test_a_wrong_world_size_is_refused_on_both_sides(waiting: ServerProcess) -> None:
    status, error = worker("--coordinator", waiting.control, "--world-size", "3")
    problem = "worker was launched with 3 ranks, the coordinator expects 2 (--ranks)"
    assert status == 1
    assert error == f"error: coordinator {waiting.control}: FAILED_PRECONDITION: {problem}"
    assert "refused rank 0" in waiting.log
    assert problem in waiting.log
    assert waiting.process.poll() is None, "the server waits for the right ranks"
    assert waiting.stop() == 0
    assert_clean(waiting.log)


def test_ranks_give_up_when_no_coordinator_answers() -> None:
    target = f"127.0.0.1:{free_port()}"
    assert worker("--coordinator", target, "--join-timeout", "1") == (
        1,
        f"error: no coordinator answers at {target} after 1 s (--join-timeout)",
    )
