"""A real `csps serve` as a child process, for as long as a bench needs it."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

from csps.core.errors import UnavailableError

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0


class ServerProcess:
    """`with ServerProcess("--workers", "2") as server:` serves at `server.target`.

    The process, and with it its ranks, is always ended. `log` is what it wrote.
    """

    def __init__(self, *flags: str) -> None:
        self._flags = flags
        self._directory = tempfile.TemporaryDirectory(prefix="csps-bench-")
        self._log_path = Path(self._directory.name) / "log"
        self._ready_path = Path(self._directory.name) / "ready.json"
        self.target = ""
        self.metrics_url = ""  # with --metrics-port
        self.openai_url = ""  # with --http-port

    @property
    def log(self) -> str:
        return self._log_path.read_text() if self._log_path.exists() else ""

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self) -> None:
        """Start without waiting."""
        command = [sys.executable, "-m", "csps", "serve", "--port", "0"]
        command += ["--ready-file", str(self._ready_path), *self._flags]
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
            )

    def wait_ready(self, check: Callable[[], None] | None = None) -> None:
        """UnavailableError, with the end of the log, if it does not get ready.

        `check` is called meanwhile, and raises if there is nothing to wait for any more.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._ready_path.exists() and (text := self._ready_path.read_text()):
                ready = json.loads(text)
                self.target, self.metrics_url = ready["target"], ready["metrics"]
                self.openai_url = ready["openai"]
                return
            if self.process.poll() is not None:
                raise UnavailableError(
                    f"csps serve ended with status {self.process.returncode}:\n{self.log[-2000:]}"
                )
            if check is not None:
                check()
            time.sleep(0.1)
        raise UnavailableError(f"csps serve was not ready in time:\n{self.log[-2000:]}")

    def stop(self) -> int:
        """End it as Ctrl-C does; its exit status. Killed, with its ranks, if it does not end."""
        if self.process.poll() is None:
            # Ranks have process groups of their own: killing the server's would leave them.
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                for child in family:
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
        return self.process.wait()

    def __enter__(self) -> "ServerProcess":
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            self._directory.cleanup()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._directory.cleanup()
