"""A real server whose ranks run in network namespaces of their own."""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from csps.bench.namespaces import INTERFACE, Links
from csps.bench.server import ServerProcess
from csps.core.errors import UnavailableError

RENDEZVOUS_PORT = 29500  # rank 0's namespace has all its ports to itself
JOIN_TIMEOUT_S = 60
LEAVE_TIMEOUT_S = 5.0


@contextmanager
def serving(links: Links, flags: Sequence[str]) -> Iterator[ServerProcess]:
    """`csps serve` on this side of the links, its ranks behind them; all ended in the end.

    `flags` of `csps serve`, without those about ranks and addresses. UnavailableError, with
    the end of a log, if the server or a rank does not get ready.
    """
    control = f"{links.host}:{_free_port(links.host)}"
    server = ServerProcess(
        *("--host", links.host, "--control", control),
        *("--workers", "0", "--ranks", str(links.num_ranks), *flags),
    )
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="csps-ranks-")))
        ranks = Ranks(links, control, directory)
        stack.callback(ranks.stop)
        server.start()
        stack.push(server)  # stops first: it asks the ranks to leave
        ranks.start()
        server.wait_ready(ranks.check)
        yield server


class Ranks:
    """`csps worker` in each namespace, on CPUs: on one machine GPUs would pass the links by."""

    def __init__(self, links: Links, control: str, directory: Path) -> None:
        self._links = links
        self._control = control
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start without waiting."""
        links = self._links
        for rank in range(links.num_ranks):
            command = links.inside(
                rank,
                # OpenMP's own threads would come on top of those that the server's flag allows.
                *("env", f"GLOO_SOCKET_IFNAME={INTERFACE}", "OMP_NUM_THREADS=1"),
                "CUDA_VISIBLE_DEVICES=",
                *(sys.executable, "-m", "csps", "worker", "--coordinator", self._control),
                *("--rank", str(rank), "--world-size", str(links.num_ranks)),
                *("--local-rank", str(rank), "--local-world-size", str(links.num_ranks)),
                *("--rendezvous", f"tcp://{links.address(0)}:{RENDEZVOUS_PORT}"),
                *("--join-timeout", str(JOIN_TIMEOUT_S), "--log-level", "WARNING"),
            )
            with self._log_path(rank).open("wb") as log:
                # Not a session of its own: Linux would give each rank its own scheduling group
                # (sched(7), autogroup), and its lanes' priorities would not count among ranks.
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    process_group=0,
                )
            self._processes.append(process)

    def check(self) -> None:
        """UnavailableError, with the end of its log, if a rank has ended."""
        for rank, process in enumerate(self._processes):
            if process.poll() is not None:
                raise UnavailableError(
                    f"rank {rank} ended with status {process.returncode}:\n"
                    f"{self._log_path(rank).read_text()[-2000:]}"
                )

    def stop(self) -> None:
        """Wait for the ranks to leave, since the server is gone; kill those that do not."""
        deadline = time.monotonic() + LEAVE_TIMEOUT_S
        try:
            for process in self._processes:
                process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in self._processes:
                process.kill()
                process.wait()

    def _log_path(self, rank: int) -> Path:
        return self._directory / f"rank{rank}.log"


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
