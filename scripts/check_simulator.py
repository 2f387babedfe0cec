"""Hold the simulator against live replays: same trace, speed and flags, a calibrated cluster.

    csps calibrate runs/before/* runs/after/* --name cpu2 --out cpu2.toml
    python scripts/check_simulator.py slice.jsonl runs/x1-* --cluster cpu2.toml --json out.json

Give other live runs than those that the cluster was calibrated from. Of runs of one speed it also
says whether the simulator puts them in the same order.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
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
TIE = 0.05  # live figures this close have no order


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


def check(folder: Path, trace: Trace, cluster: Cluster, model: SimModel) -> dict[str, Any]:
    run = read_run(folder)
    if run.interrupted or run.num_requests != len(trace.requests):
        raise CspsError(f"{folder}: is not a whole run of this trace")
    live = means(read_requests(folder))
    simulated = means(simulate(trace, cluster, model, alike(run)).requests)
    return {
        "run": run.name,
        "strategy": run.strategy,
        "speed": run.speed,
        "live": live,
        "simulated": simulated,
        "simulated_over_live": {name: simulated[name] / live[name] for name in live},
    }


def order(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each speed and figure, the pairs of runs that the simulator has the other way round."""
    found = []
    for speed in sorted({row["speed"] for row in rows}):
        mine = [row for row in rows if row["speed"] == speed]
        for name in FIGURES:
            pairs = [
                (one, other)
                for one, other in combinations(sorted(mine, key=lambda r: r["live"][name]), 2)
                if other["live"][name] > (1 + TIE) * one["live"][name]
            ]
            wrong = [
                f"{one['strategy']} < {other['strategy']}"
                for one, other in pairs
                if one["simulated"][name] >= other["simulated"][name]
            ]
            found.append({"speed": speed, "figure": name, "pairs": len(pairs), "wrong": wrong})
    return found


def show(rows: Sequence[Mapping[str, Any]], orders: Sequence[Mapping[str, Any]]) -> None:
    table = Table("run", *(f"{title}: live, simulated, ratio" for title in FIGURES.values()))
    for row in rows:
        cells = (
            f"{row['live'][name]:.3g}  {row['simulated'][name]:.3g}  "
            f"{row['simulated_over_live'][name]:.2f}"
            for name in FIGURES
        )
        table.add_row(row["run"], *cells)
    console = Console()
    console.print(table)
    for one in orders:
        wrong = ", ".join(one["wrong"]) or "none"
        console.print(
            f"speed {one['speed']:g}, {FIGURES[one['figure']]}: of {one['pairs']} pairs more than "
            f"{TIE:.0%} apart, in the wrong order: {wrong}",
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
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    try:
        trace, _ = read_any(asked.trace)
        cluster, model = load_cluster(asked.cluster), load_model(asked.model)
        rows = [check(folder, trace, cluster, model) for folder in asked.runs]
    except CspsError as error:
        sys.exit(str(error))
    orders = order(rows)
    if asked.json is not None:
        command = shlex.join(["python", *sys.argv])
        text = json.dumps(
            {**provenance(), "command": command, "runs": rows, "order": orders}, indent=1
        )
        asked.json.write_text(text + "\n", "utf-8")
    show(rows, orders)


if __name__ == "__main__":
    main()
