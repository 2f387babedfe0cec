"""Hold the simulator against live replays: same trace, speed and flags, a calibrated cluster.

    csps calibrate runs/before/* runs/after/* --name cpu2 --out cpu2.toml
    python scripts/check_simulator.py slice.jsonl runs/x1-* --cluster cpu2.toml --json out.json

Give other live runs than those that the cluster was calibrated from. Several of one server at one
speed are averaged, and it says how far apart they are: so much is the machine's. Of servers at one
speed it also says whether the simulator puts them in the same order.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from csps.core.errors import CspsError
from csps.core.plan import Layout
from csps.core.strategy import Strategy
from csps.records.provenance import provenance
from csps.records.rows import read_requests
from csps.records.run import RunInfo, read_run
from csps.sim.cluster import Cluster, load_cluster
from csps.sim.config import SimConfig
from csps.sim.model import SimModel, load_model
from csps.sim.run import simulate
from csps.trace.formats import read_any
from csps.trace.schema import Trace

FIGURES = {"ttft_s": "TTFT", "tbt_ms": "TBT", "response_s": "response time"}


def alike(run: RunInfo) -> SimConfig:
    """What the live run's server and replay were given; attention is as it was calibrated."""
    given = run.settings
    layout = given.get("layout")
    return SimConfig(
        Strategy(run.strategy),
        token_budget=given["token_budget"],
        stage_tokens=given["stage_tokens"],
        long_tokens=given["long_tokens"],
        max_running=given["max_running"],
        prefix_cache=given["prefix_cache"],
        layout=Layout(layout) if layout else None,
        shift_threshold=given["shift_threshold"],
        tbt_target_ms=given.get("tbt_target_ms", 0.0),
        speed=run.speed,
    )


def means(requests: Sequence[Any]) -> dict[str, float]:
    """As in summary.json: of requests, and of all gaps between tokens."""
    done = [row for row in requests if row.ttft_s is not None]
    gaps = [gap for row in done for gap in row.gaps_ms]
    return {
        "ttft_s": sum(row.ttft_s for row in done) / len(done),
        "tbt_ms": sum(gaps) / len(gaps),
        "response_s": sum(row.response_s for row in done) / len(done),
    }


def groups(folders: Sequence[Path], trace: Trace) -> dict[SimConfig, list[Path]]:
    """Runs by what their server and replay were given."""
    found: dict[SimConfig, list[Path]] = {}
    for folder in folders:
        run = read_run(folder)
        if run.interrupted or run.num_requests != len(trace.requests):
            raise CspsError(f"{folder}: is not a whole run of this trace")
        found.setdefault(alike(run), []).append(folder)
    return found


def check(
    config: SimConfig, folders: Sequence[Path], trace: Trace, cluster: Cluster, model: SimModel
) -> dict[str, Any]:
    runs = [means(read_requests(folder)) for folder in folders]
    live = {name: fmean(run[name] for run in runs) for name in FIGURES}
    simulated = means(simulate(trace, cluster, model, config).requests)
    return {
        "run": read_run(folders[0]).name,
        "strategy": config.strategy.value,
        "speed": config.speed,
        "live_runs": runs,
        "live": live,
        "apart": {
            name: max(run[name] for run in runs) / min(run[name] for run in runs) - 1
            for name in FIGURES
        },
        "simulated": simulated,
        "simulated_over_live": {name: simulated[name] / live[name] for name in live},
    }


def order(rows: Sequence[Mapping[str, Any]], tie: float) -> list[dict[str, Any]]:
    """For each speed and figure, the pairs of servers that the simulator has the other way round.

    Live figures whose ratio is at most 1 + `tie` have no order.
    """
    found = []
    for speed in sorted({row["speed"] for row in rows}):
        mine = [row for row in rows if row["speed"] == speed]
        for name in FIGURES:
            pairs = [
                (one, other)
                for one, other in combinations(sorted(mine, key=lambda r: r["live"][name]), 2)
                if other["live"][name] > (1 + tie) * one["live"][name]
            ]
            wrong = [
                f"{one['strategy']} < {other['strategy']}"
                for one, other in pairs
                if one["simulated"][name] >= other["simulated"][name]
            ]
            found.append({"speed": speed, "figure": name, "pairs": len(pairs), "wrong": wrong})
    return found


def show(
    rows: Sequence[Mapping[str, Any]], orders: Sequence[Mapping[str, Any]], tie: float
) -> None:
    table = Table("run", *(f"{title}: live, simulated, ratio" for title in FIGURES.values()))
    for row in rows:
        cells = (
            f"{row['live'][name]:.3g}  {row['simulated'][name]:.3g}  "
            f"{row['simulated_over_live'][name]:.2f}"
            for name in FIGURES
        )
        table.add_row(f"{row['run']} ({len(row['live_runs'])})", *cells)
    console = Console()
    console.print(table)
    for one in orders:
        wrong = ", ".join(one["wrong"]) or "none"
        console.print(
            f"speed {one['speed']:g}, {FIGURES[one['figure']]}: of {one['pairs']} pairs more than "
            f"{tie:.0%} apart, in the wrong order: {wrong}",
            highlight=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path, help="that was replayed")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of csps replay")
    parser.add_argument("--cluster", default="cpu2")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--tie", type=float, default=0.05, help="live figures this close (ratio - 1) have no order"
    )
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    try:
        trace, _ = read_any(asked.trace)
        cluster, model = load_cluster(asked.cluster), load_model(asked.model)
        rows = [
            check(config, folders, trace, cluster, model)
            for config, folders in groups(asked.runs, trace).items()
        ]
    except CspsError as error:
        sys.exit(str(error))
    orders = order(rows, asked.tie)
    if asked.json is not None:
        command = shlex.join(["python", *sys.argv])
        text = json.dumps(
            {**provenance(), "command": command, "tie": asked.tie, "runs": rows, "order": orders},
            indent=1,
        )
        asked.json.write_text(text + "\n", "utf-8")
    show(rows, orders, asked.tie)


if __name__ == "__main__":
    main()
