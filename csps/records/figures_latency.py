"""Figures of what clients saw."""

import json
import re
from collections import defaultdict
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from csps.percentiles import percentile
from csps.records.comparison import Compared, Comparison, Curve
from csps.records.figures_style import legend_below, log_axis, mark, panels
from csps.records.summary import bucket

# Shorter than anyone notices: a logarithmic axis has no 0.
LEAST_TTFT_S = 1e-3
LEAST_TBT_MS = 1.0


def cdfs(comparison: Comparison) -> Figure | None:
    """TTFT and TBT, and the tail of TBT on its own scale."""
    if not any(len(one.ttft_s.values) for one in comparison.runs):
        return None
    figure, (first, gaps, tail) = panels(3, 4.2, 3.7, 3)
    for index, one in enumerate(comparison.runs):
        _steps(first, index, one.label, one.ttft_s, LEAST_TTFT_S)
        _steps(gaps, index, one.label, one.tbt_ms, LEAST_TBT_MS)
        if len(one.tbt_ms.values):
            style = mark(index)
            longer = 1 - one.tbt_ms.shares
            values = np.maximum(one.tbt_ms.values, LEAST_TBT_MS)
            # The last has none longer than itself: a logarithmic axis ends before it.
            tail.plot(values[:-1], longer[:-1], color=style.color, linestyle=style.line)
    first.set(title="TTFT", xlabel="TTFT (s)", ylabel="share with a first token by then")
    gaps.set(title="TBT", xlabel="gap between tokens (ms)", ylabel="share of gaps at most as long")
    tail.set(title="TBT, tail", xlabel="gap between tokens (ms)", ylabel="share of gaps longer")
    for panel in (first, gaps):
        panel.set_ylim(0, 1.02)
    log_axis(tail, "y")
    tail.axhline(0.01, color="0.4", linewidth=0.8)
    tail.annotate("p99", (0.01, 0.01), xycoords=tail.get_yaxis_transform(), va="bottom")
    for panel in (first, gaps, tail):
        log_axis(panel, "x")
        panel.grid(color="0.9")
    legend_below(figure, first)
    return figure


def _steps(panel: Axes, index: int, label: str, curve: Curve, least: float) -> None:
    style = mark(index)
    values = np.maximum(curve.values, least)
    panel.plot(
        np.concatenate((values[:1], values)), np.concatenate(([0.0][: len(values)], curve.shares)),
        label=label, color=style.color, linestyle=style.line, drawstyle="steps-post",
    )  # fmt: skip


def ttft_by_prompt(comparison: Comparison) -> Figure | None:
    """A panel per run, on the same axes."""
    found = [(i, one, _points(one)) for i, one in enumerate(comparison.runs)]
    found = [(i, one, points) for i, one, points in found if points]
    if not found:
        return None
    figure, cells = panels(len(found), 3.4, 3.0, 4, sharex=True, sharey=True)
    first = _medians(found[0][2])
    for cell, (index, one, points) in zip(cells, found, strict=True):
        style = mark(index)
        x, y = zip(*points, strict=True)
        # Thousands of points are a picture, not shapes: SVG stays small.
        cell.scatter(x, y, s=9, color="0.6", alpha=0.6, linewidths=0, rasterized=True)
        if one is not found[0][1]:
            cell.plot(*zip(*first, strict=True), color="0.2", linestyle="--", linewidth=1.0)
        medians = _medians(points)
        cell.plot(*zip(*medians, strict=True), color=style.color, marker=style.marker,
                  markersize=5, linewidth=1.8)  # fmt: skip
        cell.set_title(one.label, fontsize=9)
        cell.grid(color="0.9")
    for axis in ("x", "y"):
        log_axis(cells[0], axis)
    figure.supxlabel("prompt (tokens)", fontsize=9)
    figure.supylabel("TTFT (s)", fontsize=9)
    return figure


def _points(one: Compared) -> list[tuple[int, float]]:
    return [
        (row.prompt_tokens, max(row.ttft_s, LEAST_TTFT_S))
        for row in one.requests
        if row.ttft_s is not None and row.prompt_tokens
    ]


def _medians(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """By powers of two, drawn in the middle of each."""
    buckets: dict[int, list[float]] = defaultdict(list)
    for tokens, ttft_s in points:
        buckets[bucket(tokens)].append(ttft_s)
    return [(first * 2**0.5, percentile(buckets[first], 0.5)) for first in sorted(buckets)]


def rate_latency(comparison: Comparison) -> Figure | None:
    """None unless two runs differ in rate alone."""
    groups: dict[str, list[Compared]] = defaultdict(list)
    for one in comparison.runs:
        if one.summary["request_rate"]:
            groups[_all_but_rate(one)].append(one)
    lines = [
        sorted(group, key=lambda one: one.summary["request_rate"]) for group in groups.values()
    ]
    if not any(len({one.summary["request_rate"] for one in line}) > 1 for line in lines):
        return None
    wanted = [("ttft_s", "mean"), ("ttft_s", "p99"), ("tbt_ms", "mean"), ("tbt_ms", "p99")]
    titles = {"ttft_s": "TTFT (s)", "tbt_ms": "TBT (ms)"}
    figure, cells = panels(4, 4.4, 3.1, 2, sharex=True)
    for cell, (key, name) in zip(cells, wanted, strict=True):
        for index, line in enumerate(lines):
            _line(cell, index, line, key, name)
        cell.set_ylabel(f"{name} {titles[key]}")
        log_axis(cell, "y")
        cell.grid(color="0.9")
    for cell in cells[2:]:
        cell.set_xlabel("requests per second")
    legend_below(figure, cells[0])
    return figure


def _line(cell: Axes, index: int, line: list[Compared], key: str, name: str) -> None:
    style = mark(index)
    spreads = [(one.summary["request_rate"], one.summary["latency"][key]) for one in line]
    known = [(rate, found) for rate, found in spreads if found[name]]
    rates, values = [rate for rate, _ in known], [found[name] for _, found in known]
    cell.plot(rates, values, color=style.color, linestyle=style.line, label=_group_label(line),
              marker=style.marker, markersize=6)  # fmt: skip
    bounds = [(rate, found[name]) for rate, found in known if name in found["at_least"]]
    cell.plot([x for x, _ in bounds], [y for _, y in bounds], color=style.color, linestyle="none",
              marker=style.marker, markersize=6, markerfacecolor="white")  # fmt: skip


def _all_but_rate(one: Compared) -> str:
    run = one.run
    same: list[Any] = [
        run.kind, run.strategy, run.model, run.cluster, run.ranks, run.replicas, run.settings,
    ]  # fmt: skip
    return json.dumps(same, sort_keys=True, default=str)


def _group_label(line: list[Compared]) -> str:
    """The name of the runs without the rate that it ends in, or their strategy."""
    if len(line) == 1:
        return line[0].label
    run = line[0].run
    names = {re.sub(r"[-_@ ]*x?[0-9.]+$", "", one.run.name) for one in line}
    name = names.pop() if len(names) == 1 else ""
    return (name or run.strategy) + (" (simulated)" if run.simulated else "")
