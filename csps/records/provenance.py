"""How a result came about: the command, the commit, the day and the machine."""

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import TypedDict

import psutil


class Provenance(TypedDict):
    """`date` in ISO 8601, UTC; `commit` with -dirty if tracked files were changed."""

    command: str
    commit: str
    date: str
    machine: dict[str, object]


def provenance() -> Provenance:
    """Of what this process does."""
    return {
        "command": " ".join(["csps", shlex.join(sys.argv[1:])]).rstrip(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }


def commit() -> str:
    """The commit of this checkout, "unknown" outside one."""
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "--short", "HEAD")
        return head + ("-dirty" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def machine() -> dict[str, object]:
    """Processor, memory, system and versions."""
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
