"""Figures of what ranks did."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from csps.core.plan import Lane
from csps.records.comparison import Compared, Comparison
from csps.records.figures_style import MARKS, legend_below, mark, panels
from csps.records.rows import StepRow
from csps.records.steps import NUM_BINS

MAX_RANKS = 4  # of a timeline: more rows than a page has
MAX_STEPS = 600
MAX_RUNS = 6
MAX_LINES = 8

_COMPUTE: dict[str, Any] = {"facecolor": "#3b5d86", "edgecolor": "none"}
_EXPOSED: dict[str, Any] = {
    "facecolor": "#f5c98a",
    "edgecolor": "#7a4a00",
    "hatch": "//////",
    "linewidth": 0.0,
}


def timeline(comparison: Comparison) -> Figure | None:
    """A panel per run, a row per rank and lane."""
    runs = [one for one in comparison.runs if _kept(one)][:MAX_RUNS]
    if not runs:
        return None
    heights = [0.9 + 0.3 * len(_places(one)) for one in runs]
    figure = Figure(figsize=(11, sum(heights) + 0.5), layout="constrained")
    cells = figure.subplots(len(runs), 1, squeeze=False, height_ratios=heights)[:, 0]
    for cell, one in zip(cells, runs, strict=True):
        _bars(cell, one)
    cells[-1].set_xlabel("seconds since the run began")
    figure.legend(
        handles=[
            Patch(label="compute", **_COMPUTE),
            Patch(label="exposed communication", **_EXPOSED),
            Patch(label="idle", facecolor="white", edgecolor="0.6"),
        ],
        loc="outside lower center", ncols=3,
    )  # fmt: skip
    return figure


def _kept(one: Compared) -> list[StepRow]:
    return [row for row in one.steps.kept if row.replica == 0 and row.wall_s]


def _places(one: Compared) -> list[tuple[int, Lane]]:
    """Rows of the panel from the top: ranks, and in each the lanes that the run has."""
    rows = _kept(one)
    ranks = min(max(len(row.wall_s) for row in rows), MAX_RANKS)
    lanes = [lane for lane in Lane if any(row.lane is lane for row in rows)]
    return [(rank, lane) for rank in range(ranks) for lane in lanes]


def _bars(cell: Axes, one: Compared) -> None:
    rows, places = _kept(one), _places(one)
    start, stop = one.steps.window or (0.0, one.run.elapsed_s)
    begins = sorted(row.started_s for row in rows if row.started_s >= start)
    if len(begins) > MAX_STEPS:  # those that can be told apart
        stop = min(stop, begins[MAX_STEPS])
    for height, (rank, lane) in enumerate(places):
        mine = [row for row in rows if row.lane is lane and rank < len(row.wall_s)]
        compute = [(row.started_s, row.compute_s[rank]) for row in mine]
        exposed = [(row.started_s + row.compute_s[rank], row.exposed_comm_s[rank]) for row in mine]
        for spans, style in ((compute, _COMPUTE), (exposed, _EXPOSED)):
            cell.broken_barh(spans, (height - 0.4, 0.8), rasterized=True, **style)
    cell.set_xlim(start, stop)
    cell.set_ylim(len(places) - 0.5, -0.5)
    cell.set_yticks(range(len(places)), [f"rank {rank} {lane}" for rank, lane in places])
    ranks, shown = max(len(row.wall_s) for row in rows), places[-1][0] + 1
    title = [one.label]
    title += [f"{shown} of {ranks} ranks"] if shown < ranks else []
    title += [f"1 of {one.run.replicas} replicas"] if one.run.replicas > 1 else []
    cell.set_title(", ".join(title), fontsize=9)
    cell.grid(axis="x", color="0.9")
    cell.set_axisbelow(True)


def occupancy(comparison: Comparison) -> Figure | None:
    """A panel per run; many ranks are thin lines of one kind."""
    runs = [one for one in comparison.runs if one.steps.occupancy]
    if not runs:
        return None
    figure, cells = panels(len(runs), 3.6, 2.7, 3, sharey=True)
    for cell, one in zip(cells, runs, strict=True):
        _shares(cell, one)
        cell.set_title(one.label, fontsize=9)
        cell.set_ylim(0, 1.02)
        cell.grid(color="0.9")
    figure.supxlabel("seconds since the run began", fontsize=9)
    figure.supylabel("share of KV pages in use", fontsize=9)
    return figure


def _shares(cell: Axes, one: Compared) -> None:
    times = (np.arange(NUM_BINS) + 0.5) * one.run.elapsed_s / NUM_BINS
    lines = sorted(one.steps.occupancy.items())
    for index, ((replica, rank), bins) in enumerate(lines):
        shares = np.array(bins)
        known = ~np.isnan(shares)
        name = f"rank {rank}" if one.run.replicas == 1 else f"replica {replica} rank {rank}"
        if len(lines) > MAX_LINES:
            label = f"each of {len(lines)} ranks" if index == 0 else None
            cell.plot(times[known], shares[known], color="0.4", linewidth=0.5, label=label,
                      rasterized=True)  # fmt: skip
        else:
            style = mark(index)
            label = name if len(lines) > 1 or one.run.ranks == 1 else "every rank"
            cell.plot(times[known], shares[known], color=style.color, linestyle=style.line,
                      linewidth=1.1, label=label)  # fmt: skip
    cell.legend(fontsize=7, loc="best")


def bytes_moved(comparison: Comparison) -> Figure | None:
    """A bar per run."""
    runs = [one for one in comparison.runs if any(x.dense_bytes for x in one.steps.lanes.values())]
    if not runs:
        return None
    kinds = sorted({kind for one in runs for kind in one.steps.compared_bytes})
    figure, (cell,) = panels(1, 9.0, 1.0 + 0.45 * len(runs), 1)
    _stacks(cell, runs, kinds)
    legend_below(figure, cell, 6)
    return figure


def _stacks(cell: Axes, runs: Sequence[Compared], kinds: Sequence[str]) -> None:
    places = np.arange(len(runs))
    left = np.zeros(len(runs))
    for index, kind in enumerate(kinds):
        style = MARKS[index % len(MARKS)]
        widths = np.array([one.steps.compared_bytes[kind] / 1e9 for one in runs])
        cell.barh(places, widths, 0.6, left=left, label=kind, facecolor=style.color,
                  edgecolor="white", hatch=style.hatch, linewidth=0.0)  # fmt: skip
        left += widths
    dense = np.array([sum(x.dense_bytes for x in one.steps.lanes.values()) / 1e9 for one in runs])
    cell.plot(dense, places, "k|", markersize=16, markeredgewidth=2.5, label="exact attention")
    for place, (sent, exact) in enumerate(zip(left, dense, strict=True)):
        cell.annotate(f"{sent / exact:.2f} of exact", (max(sent, exact), place), xytext=(6, 0),
                      textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    cell.set_xlim(0, 1.2 * max(*left, *dense))
    cell.set_ylim(len(runs) - 0.5, -0.5)
    cell.set_yticks(places, [one.label for one in runs])
    cell.set_xlabel("GB sent by all ranks")
