"""Serve the default model on two ranks, ask about a real long document, stop.

The document is a module of Python's standard library: every machine has one, and its several
thousand tokens are split over both ranks.
"""

import json
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CSPS = (sys.executable, "-m", "csps")
DOCUMENT = Path(textwrap.__file__)  # about 4,800 tokens
QUESTION = (
    "Which function of this module removes common leading whitespace from every line of a text?"
)
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0


@contextmanager
def serving(*flags: str) -> Iterator[str]:
    """HOST:PORT of a server that lives as long as the block. SystemExit if it does not start."""
    with tempfile.TemporaryDirectory(prefix="csps-demo-") as folder:
        ready = Path(folder, "ready.json")
        command = [*CSPS, "serve", "--port", "0", "--ready-file", str(ready), *flags]
        # A session of its own: Ctrl-C reaches this script alone, which then stops the server.
        server = subprocess.Popen(command, start_new_session=True)
        try:
            yield wait_ready(server, ready)
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_ready(server: "subprocess.Popen[bytes]", ready: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}")
        if ready.is_file() and (text := ready.read_text()):
            return str(json.loads(text)["target"])
        time.sleep(0.1)
    raise SystemExit(f"the server was not ready after {START_TIMEOUT_S:.0f} s")


def main() -> int:
    with serving("--workers", "2", "--log-level", "WARNING") as target:
        print(f"{DOCUMENT}\n{QUESTION}\n", flush=True)
        command = [*CSPS, "submit", "--target", target, "--file", str(DOCUMENT)]
        options = ["--prompt", QUESTION, "--max-tokens", "128"]
        return subprocess.run([*command, *options], check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
