"""Starts the ranks of this machine as child processes and ends them."""

import asyncio
import logging
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 30.0


class LocalWorkers:
    """N worker processes on this machine, meeting through a file in a private directory."""

    def __init__(
        self,
        num_ranks: int,
        control_address: str,
        threads_per_rank: int,
        metrics: tuple[str, int] | None,
    ) -> None:
        """`metrics`: host and port of the coordinator's; the ranks' are behind it, 0 stays 0."""
        self._num_ranks = num_ranks
        self._metrics = metrics
        self._control_address = control_address
        self._threads = threads_per_rank or max((os.cpu_count() or 1) // num_ranks, 1)
        self._directory = Path(tempfile.mkdtemp(prefix="csps-"))
        self._processes: list[asyncio.subprocess.Process] = []

    async def start(self) -> None:
        """Start the processes; they join the coordinator by themselves."""
        # Loopback is enough on one machine, and OpenMP must know its share before it starts.
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": str(self._threads),
        }
        level = logging.getLevelName(logger.getEffectiveLevel())
        for rank in range(self._num_ranks):
            command = [
                *(sys.executable, "-m", "csps", "worker"),
                *("--coordinator", self._control_address),
                *("--rank", str(rank), "--world-size", str(self._num_ranks)),
                *("--local-rank", str(rank), "--local-world-size", str(self._num_ranks)),
                *("--rendezvous", f"file://{self._directory}/store"),
                *("--join-timeout", str(JOIN_TIMEOUT_S), "--log-level", level),
                *self._metrics_flags(),
            ]
            # A process group of its own: Ctrl-C in the terminal reaches the coordinator alone,
            # which then stops the ranks in order. Not a session of its own: Linux would give
            # each its own scheduling group (sched(7), autogroup), and one rank's prefill would
            # no longer give way to another's decode.
            process = await asyncio.create_subprocess_exec(
                *command, env=environment, process_group=0
            )
            self._processes.append(process)

    def _metrics_flags(self) -> tuple[str, ...]:
        if self._metrics is None:
            return ()
        host, port = self._metrics
        return ("--metrics-host", host, "--metrics-port", str(port + 1 if port else 0))

    async def wait_any(self) -> str:
        """Return a sentence about the first process that ends."""
        waits = {
            asyncio.create_task(process.wait()): rank
            for rank, process in enumerate(self._processes)
        }
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        task = done.pop()
        return f"the process of rank {waits[task]} {_describe_end(task.result())}"

    async def stop(self, grace_s: float) -> None:
        """Wait `grace_s` seconds for the processes, then kill those that are left."""
        waits = [asyncio.create_task(process.wait()) for process in self._processes]
        if waits:
            _, left = await asyncio.wait(waits, timeout=grace_s)
            if left:
                logger.warning("killing %d ranks that did not stop", len(left))
            for process in self._processes:
                if process.returncode is None:
                    process.kill()
            await asyncio.gather(*waits)
        shutil.rmtree(self._directory, ignore_errors=True)


def _describe_end(status: int) -> str:
    """`status` as asyncio gives it: the negated signal where a signal ended the process."""
    if status < 0:
        return f"was killed by signal {-status} ({signal.strsignal(-status)})"
    return f"ended with status {status}"
