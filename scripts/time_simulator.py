"""How long `csps simulate` takes by the clock, start and files included.

    python scripts/time_simulator.py conversation.jsonl --repeat 3 --json simulator_speed.json
    python scripts/time_simulator.py slice.jsonl --other ../older -- --strategy sarathi

With --other FOLDER, a checkout of another commit, the two take turns on the same machine, and the
medians' ratio is what counts. What follows `--` are flags of csps simulate.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from csps.records.provenance import provenance

HERE = Path(__file__).parents[1]


def timed(folder: Path, trace: Path, flags: Sequence[str]) -> float:
    """Seconds of one run of the checkout in `folder`."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "csps", "simulate", str(trace), "--out", out, *flags]
        path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
        begun = time.perf_counter()
        subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path},
            stderr=subprocess.DEVNULL,
            check=True,
        )
        return time.perf_counter() - begun


def commit(folder: Path) -> str:
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(
        words, cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("--cluster", default="a100x32")
    parser.add_argument("--model", default="llama-3.1-70b")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--other", type=Path, help="a checkout of another commit, to compare with")
    parser.add_argument("--json", type=Path)
    parser.add_argument("flags", nargs="*", help="of csps simulate, after --")
    asked = parser.parse_args()
    flags = ["--cluster", asked.cluster, "--model", asked.model, *asked.flags]
    folders = {"this": HERE, **({"other": asked.other.resolve()} if asked.other else {})}
    seconds: dict[str, list[float]] = {name: [] for name in folders}
    for _ in range(asked.repeat):
        for name, folder in folders.items():
            seconds[name].append(timed(folder, asked.trace.resolve(), flags))
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    results = {
        "flags": flags,
        "commits": {name: commit(folder) for name, folder in folders.items()},
        "seconds": seconds,
        "median_s": {name: median(values) for name, values in seconds.items()},
    }
    if asked.other:
        ratio = median(seconds["this"]) / median(seconds["other"])
        results["this_over_other"] = ratio
        print(f"this takes {ratio:.2f} of the other's time")
    if asked.json is not None:
        command = " ".join(["python", *sys.argv])
        record = {**provenance(), "command": command, **results}
        asked.json.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
