"""Draw the simulated studies, from the JSON of scripts/study_paper.py and scripts/study_shift.py.

    python scripts/draw_studies.py paper docs/results/sim_paper.json --out docs/img/sim-paper
    python scripts/draw_studies.py shift docs/results/sim_shift.json --out docs/img/sim-shift

writes OUT.svg and OUT.png, readable in grey. paper: mean latencies of CSPS and of Sarathi-Serve,
each in its best configuration, over the load; times better. shift: bars beside the paper's.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from csps.records.figures_style import legend_below, log_axis, mark, panels

LATENCIES = (("ttft_s", "TTFT (s)"), ("tbt_ms", "TBT (ms)"), ("response_s", "response time (s)"))
SYSTEMS = (("csps", "CSPS"), ("sarathi", "Sarathi-Serve"))
PARTS = (("mean", "-"), ("p99", ":"))
BARS = (
    ("ttft_ms", "TTFT, one request at a time (ms)"),
    ("tpot_ms", "TPOT, one request at a time (ms)"),
    ("throughput_ktok_s", "all at once (1,000 tokens/s)"),
)


def draw_paper(record: dict[str, Any]) -> Figure:
    """A row for each model, of the first trace; a panel for each latency."""
    first = record["studies"][0]["trace"]["source"]
    studies = [study for study in record["studies"] if study["trace"]["source"] == first]
    figure, cells = panels(len(LATENCIES) * len(studies), 4.0, 3.1, len(LATENCIES))
    for row, study in enumerate(studies):
        cells_of_row = cells[row * len(LATENCIES) : (row + 1) * len(LATENCIES)]
        for cell, (name, title) in zip(cells_of_row, LATENCIES, strict=True):
            _latency(cell, study, name)
            cell.set_ylabel(title)
            cell.set_title(f"{study['model']} on {study['cluster']}", fontsize=10)
    for cell in cells[-len(LATENCIES) :]:
        cell.set_xlabel("load, of Sarathi-Serve's saturation")
    figure.suptitle("Simulated: CSPS and Sarathi-Serve, each in its best configuration")
    legend_below(figure, cells[0])
    return figure


def _latency(cell: Axes, study: dict[str, Any], name: str) -> None:
    loads = [row["load"] for row in study["loads"]]
    for index, (system, title) in enumerate(SYSTEMS):
        style = mark(index)
        for part, line in PARTS:
            values = [row[system][name][part] for row in study["loads"]]
            cell.plot(
                loads, values, color=style.color, linestyle=line, marker=style.marker,
                markersize=5 if part == "mean" else 3, label=f"{title}, {part}",
            )  # fmt: skip
    log_axis(cell, "y")
    cell.axvline(1, color="0.6", linewidth=0.8)
    cell.set_xlim(left=0)
    cell.grid(color="0.9")


def draw_shift(record: dict[str, Any]) -> Figure:
    """A panel for each figure of the table; the paper's bar beside the simulated one."""
    names = list(record["deployments"])
    figure, cells = panels(len(BARS), 4.0, 3.2, len(BARS))
    for cell, (key, title) in zip(cells, BARS, strict=True):
        for index, source in enumerate(("paper", "simulated")):
            style = mark(index)
            values = [record["deployments"][name][source][key] for name in names]
            places = [place + 0.4 * (index - 0.5) for place in range(len(names))]
            bars = cell.bar(
                places, values, 0.38, color=style.color, hatch=style.hatch, edgecolor="white",
                label=source,
            )  # fmt: skip
            cell.bar_label(bars, fmt="{:.3g}", fontsize=7)
        cell.margins(y=0.12)  # room for the numbers
        cell.set_xticks(range(len(names)), names)
        cell.set_title(title, fontsize=10)
    figure.suptitle("Simulated beside measured by the paper: Llama-70B fp8 on 8 H200")
    legend_below(figure, cells[0])
    return figure


DRAWN = {"paper": draw_paper, "shift": draw_shift}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=DRAWN)
    parser.add_argument("results", type=Path, help="JSON of the study")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    args = parser.parse_args()
    record = json.loads(args.results.read_text())
    if not record.get("simulated"):
        raise SystemExit(f"{args.results}: is not a JSON of a simulated study")
    # Text stays text, and the same data give the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "csps"})
    figure = DRAWN[args.study](record)
    figure.savefig(args.out.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(args.out.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
