"""What the machine is, and the two rates that floors come from."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from scripts.bench_gpu.bench import Bench, Floors, Row

PACKAGES = ("torch", "triton", "flashinfer-python", "numpy")
SMI_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw",
    "temperature.gpu", "utilization.gpu", "memory.used",
)  # fmt: skip


def run(bench: Bench) -> None:
    """Rows `facts`, `matrix product` and `copy`."""
    bench.case("facts", lambda: _facts(bench.device))
    size = bench.sizes.matrix
    a, b = bench.normal(size, size), bench.normal(size, size)
    out = torch.empty_like(a)
    bench.timed("matrix product", lambda: torch.mm(a, b, out=out), flops=2 * size**3)
    num_bytes = bench.sizes.copy_bytes
    source = bench.normal(num_bytes // 4, dtype=torch.float32)
    target = torch.empty_like(source)
    bench.timed("copy", lambda: target.copy_(source), num_bytes=2 * num_bytes)
    bench.case("state afterwards", _smi)


def floors_of(rows: list[Row]) -> Floors | None:
    """From this section's rows; None if either rate could not be measured."""
    by_case = {row["case"]: row for row in rows}
    matrix, copy = by_case.get("matrix product", {}), by_case.get("copy", {})
    if "median_s" not in matrix or "median_s" not in copy:
        return None
    return Floors(
        flops_per_s=matrix["flops"] / matrix["median_s"],
        bytes_per_s=copy["bytes"] / copy["median_s"],
    )


def _facts(device: torch.device) -> Row:
    facts: dict[str, Any] = {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        facts |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": total,
            "free_bytes": free,
            "cuda": torch.version.cuda,
            "nvidia_smi": _smi(),
        }
    return facts


def _smi() -> Row:
    """Clocks, power and load as nvidia-smi reads them; it is asked and changes nothing."""
    query = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return {"unknown": f"{type(error).__name__}: {error}"}
    return dict(zip(SMI_FIELDS, done.stdout.splitlines()[0].split(", "), strict=False))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
