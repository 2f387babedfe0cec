"""What every bench writes: how it was run, where, and what came out."""

import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

import psutil

from csps.core.errors import ConfigError


def check_writable(path: Path | None) -> None:
    """ConfigError if `write` could not write there: known before minutes of measuring."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"--json: {path}: {error.strerror}") from None


def write(path: Path | None, bench: str, parameters: object, results: object) -> None:
    """Write one run's JSON; nothing if no path was given."""
    if path is None:
        return
    record = {
        "bench": bench,
        "command": " ".join(["csps", shlex.join(sys.argv[1:])]).rstrip(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "parameters": parameters,
        "results": results,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def _commit() -> str:
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "--short", "HEAD")
        return head + ("-dirty" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _machine() -> dict[str, object]:
    return {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "csps": _version("csps"),
    }


def _cpu_name() -> str:
    try:
        fields = dict(
            line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if line
        )
    except (OSError, ValueError):
        return platform.processor()
    family, model = fields.get("cpu family\t", ""), fields.get("model\t\t", "")
    name = fields.get("model name\t", platform.processor())
    return f"{name.strip()} (family {family.strip()} model {model.strip()})"


def _version(package: str) -> str:
    try:
        return installed(package)
    except PackageNotFoundError:
        return "not installed"
