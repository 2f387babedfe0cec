"""One section, in a process of its own; started by scripts.bench_gpu."""

import argparse
import importlib
import json
import time
from pathlib import Path

import torch

from scripts.bench_gpu.bench import Bench, Floors, Row
from scripts.bench_gpu.machine import floors_of
from scripts.bench_gpu.sizes import FULL, QUICK

# Module and function of each. Loaded when they run: what one cannot import does not fail another.
SECTIONS = {
    "machine": ("machine", "run"),
    "parity": ("parity", "run"),
    "prefill": ("prefill", "run"),
    "decode": ("decode", "run"),
    "selection": ("selection", "run"),
    "llama": ("engine", "llama"),
    "default_model": ("engine", "default_model"),
    "bandwidth": ("bandwidth", "run"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SECTIONS)
    parser.add_argument("--rows", type=Path, required=True, help="where its rows go")
    parser.add_argument("--record", type=Path, required=True, help="of the sections before it")
    parser.add_argument("--device", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    device = torch.device(asked.device, 0) if asked.device == "cuda" else torch.device("cpu")

    def save(rows: list[Row]) -> None:
        part = asked.rows.with_name(asked.rows.name + ".part")
        part.write_text(json.dumps(rows))
        part.replace(asked.rows)

    bench = Bench(
        device=device,
        # Triton's interpreter computes garbage in bf16.
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        sizes=QUICK if asked.quick else FULL,
        floors=None if asked.name == "machine" else _floors(asked.record),
        model=asked.model,
        deadline=time.perf_counter() + asked.seconds,
        save=save,
        seed=asked.seed,
    )
    module, function = SECTIONS[asked.name]
    getattr(importlib.import_module(f"scripts.bench_gpu.{module}"), function)(bench)


def _floors(record: Path) -> Floors | None:
    if not record.exists():
        return None
    sections = json.loads(record.read_text())["sections"]
    return floors_of(sections["machine"]["rows"]) if "machine" in sections else None


if __name__ == "__main__":
    main()
