"""Measure the GPU path: every kernel beside its floor and the best dense one, and the engine.

    make bench-gpu PYTHON=python3 ARGS="--model SmolLM2-135M-Instruct.Q4_1.gguf"
    python -m scripts.bench_gpu --device cpu --quick --out /tmp/bench   # as CI does: no figures

Each section runs in a process of its own, so that what breaks one, a CUDA error included, leaves
the others alone. Writes bench.json (quick.json with --quick) to --out after each of them.
docs/results/gpu/README.md says more.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from csps.checkpoint.locate import DEFAULT_MODEL
from csps.records.provenance import provenance
from scripts.bench_gpu import report
from scripts.bench_gpu.sizes import FULL, QUICK

# Of a process to start, and to end by itself once its time is up.
START_S, GRACE_S = 15.0, 5.0


def main() -> None:
    asked = _parse()
    sizes = QUICK if asked.quick else FULL
    sections = list(sizes.budgets_s)
    chosen = asked.only.split(",") if asked.only else sections
    if unknown := set(chosen) - set(sections):
        sys.exit(f"--only: {', '.join(sorted(unknown))}: expected some of {', '.join(sections)}")
    # The floors of all others come from it.
    chosen = [name for name in sections if name in {"machine", *chosen}]
    asked.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "bench": "gpu",
        **provenance(),
        "command": shlex.join(["python", "-m", "scripts.bench_gpu", *sys.argv[1:]]),
        "parameters": {
            "device": asked.device, "quick": asked.quick, "model": asked.model, "seed": asked.seed,
        },
        "sections": {},
    }  # fmt: skip
    path = asked.out / ("quick.json" if asked.quick else "bench.json")
    deadline = time.monotonic() + asked.minutes * 60
    for index, name in enumerate(chosen):
        later_s = sum(sizes.budgets_s[other] for other in chosen[index + 1 :])
        budget_s = max(deadline - time.monotonic() - later_s, sizes.budgets_s[name] / 2)
        print(f"{name}: at most {budget_s:.0f} s", flush=True)
        record["sections"][name] = _run_section(asked, name, budget_s, path)
        record["targets"] = [] if asked.quick else report.targets(record["sections"])
        _write(path, record)
    report.show(record["sections"], record["targets"], Console(width=200))
    print(f"written: {path}")
    if any(
        section["status"] != "ok" or _failed(section) for section in record["sections"].values()
    ):
        sys.exit("some cases failed: the record has their tracebacks")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu"))
    parser.add_argument("--only", default="", help="sections, by commas; machine always runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, whose figures say nothing"
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as of csps serve")
    parser.add_argument("--minutes", type=float, default=7.5, help="for all sections together")
    parser.add_argument("--seed", type=int, default=0, help="of the random data")
    return parser.parse_args()


def _run_section(
    asked: argparse.Namespace, name: str, budget_s: float, path: Path
) -> dict[str, Any]:
    """Its rows, and how it ended: ok, failed, timed out."""
    rows_path = path.with_name(f"{name}.rows.json")
    rows_path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "scripts.bench_gpu.section", name, "--rows", str(rows_path)]
    command += ["--device", asked.device, "--model", asked.model, "--seed", str(asked.seed)]
    command += ["--seconds", str(budget_s), "--record", str(path)]
    command += ["--quick"] if asked.quick else []
    # Chosen when triton is imported: on a CPU its kernels are interpreted.
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if asked.device == "cpu" else {})}
    begun = time.monotonic()
    try:
        limit_s = START_S + budget_s + GRACE_S
        done = subprocess.run(
            command,
            env=environment,
            timeout=limit_s,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        said = done.stderr[-8000:]
        section = {"status": "ok", "said": said}
        if done.returncode:
            section = {"status": "failed", "why": said}
    except subprocess.TimeoutExpired as late:
        section = {"status": "timed out", "why": str(late.stderr or "")[-8000:]}
    section["seconds"] = time.monotonic() - begun
    section["rows"] = json.loads(rows_path.read_text()) if rows_path.exists() else []
    rows_path.unlink(missing_ok=True)
    if section["status"] != "ok":
        print(f"{name} {section['status']}: {section['why']}", file=sys.stderr, flush=True)
    return section


def _failed(section: dict[str, Any]) -> bool:
    return any("error" in row for row in section["rows"])


def _write(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all: whoever ends this process finds a record."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    main()
