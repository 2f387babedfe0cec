"""Ranks that torchrun starts join a coordinator that starts none."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csps.bench.server import ServerProcess
from tests.e2e.harness import Client, assert_clean, free_port, prompt, request


@contextmanager
def torchrun(num_ranks: int, control: str) -> Iterator[subprocess.Popen[bytes]]:
    """`torchrun -m csps worker`, always ended."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)),
        *("--master-addr", "127.0.0.1", "--master-port", str(free_port())),
        *("-m", "csps", "worker", "--coordinator", control),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def serve_two(tiny: Path, control: str) -> ServerProcess:
    return ServerProcess(
        *("--workers", "0", "--ranks", "2", "--control", control),
        *("--model", str(tiny), "--dtype", "float32", "--long-tokens", "128"),
    )


def test_torchrun_ranks_serve(tiny: Path, two_ranks) -> None:
    control = f"127.0.0.1:{free_port()}"
    asked = request(prompt(300), max_tokens=20, ignore_eos=True)
    with torchrun(2, control) as ranks, serve_two(tiny, control) as server:
        client = Client(server.target)
        assert client.generate(asked).token_ids == two_ranks.generate(asked).token_ids
        client.close()
        assert server.stop() == 0
        assert ranks.wait(30) == 0
        assert_clean(server.log)


def test_a_wrong_number_of_ranks_is_refused(tiny: Path) -> None:
    control = f"127.0.0.1:{free_port()}"
    server = serve_two(tiny, control)
    server.start()
    try:
        with torchrun(1, control) as ranks:
            output, _ = ranks.communicate(timeout=60)
            assert ranks.returncode != 0
            assert b"launched with 1 ranks, the coordinator expects 2" in output
    finally:
        server.stop()
        server.__exit__(None, None, None)
