"""Runs side by side: their records, read once, and the figures of each against the first's."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from csps.core.errors import ConfigError
from csps.records.rows import RequestRow, iter_steps, read_requests
from csps.records.run import RunInfo, read_run
from csps.records.spread import Floats, floats
from csps.records.steps import StepDigest
from csps.records.summary import NOTES, summarize_digest

MAX_WINDOW_S = 60.0
CURVE_POINTS = 200
_ALIKE = ("trace", "num_requests", "speed", "model", "slo_ttft_s", "slo_tbt_ms")


class Metric(NamedTuple):
    """A row of the table. `lower`: which way is better, None: neither."""

    title: str
    unit: str
    lower: bool | None
    path: tuple[str, ...]  # in the summary


def _latency(title: str, unit: str, key: str) -> list[Metric]:
    names = ("mean", "p50", "p90", "p99")
    return [Metric(f"{title} {name}", unit, True, ("latency", key, name)) for name in names]


METRICS = (
    *_latency("TTFT", "s", "ttft_s"),
    *_latency("TBT", "ms", "tbt_ms"),
    *_latency("worst gap", "ms", "worst_gap_ms"),
    *_latency("response time", "s", "response_s"),
    *_latency("normalised latency", "s/token", "normalized_s"),
    *_latency("queue time", "s", "queue_s"),
    Metric("prefill throughput", "tokens/s", False, ("throughput", "prefill_tok_s")),
    Metric("prefill, uncached", "tokens/s", False, ("throughput", "prefill_uncached_tok_s")),
    Metric("decode throughput", "tokens/s", False, ("throughput", "decode_tok_s")),
    *(
        Metric(f"{lane} lane, busy", "tokens/s", False,
               ("steps", "lanes", lane, "tokens_per_busy_s"))
        for lane in ("prefill", "decode", "mixed")
    ),
    Metric("goodput at SLO", "requests/s", False, ("slo", "goodput_req_s")),
    Metric("requests within SLO", "share", False, ("slo", "attained_share")),
    Metric("requests done", "", False, ("requests", "done")),
    Metric("requests failed", "", True, ("requests", "failed")),
    Metric("requests unfinished", "", True, ("requests", "unfinished")),
    Metric("requests offered", "requests/s", None, ("request_rate",)),
    Metric("first sent to last ended", "s", True, ("makespan_s",)),
    Metric("sent late at most", "s", None, ("late_s_max",)),
    Metric("prefix cache hits", "share", False, ("cache", "hit_share")),
    *(
        Metric(f"{lane} comm exposed", "share", True, ("steps", "lanes", lane, "exposed_share"))
        for lane in ("prefill", "decode", "mixed")
    ),
    Metric("bytes against dense", "share", True, ("steps", "bytes_against_dense")),
    Metric("density", "share", True, ("steps", "density")),
    Metric("recall mean", "share", False, ("steps", "recall", "mean")),
    Metric("KV pages in use, most", "share", None, ("steps", "kv_share_max")),
    *(
        Metric(f"predicted step, {layout} error", "share", True,
               ("steps", "prediction_error", layout, "mean"))
        for layout in ("sp", "tp")
    ),
)  # fmt: skip


class Curve(NamedTuple):
    """Values in ascending order, and the share of all that is at most as large."""

    values: Floats
    shares: Floats


class Cell(NamedTuple):
    """A figure of a run; `ratio` to the baseline's; `at_least`: it is a lower bound."""

    value: float | None
    ratio: float | None
    at_least: bool


@dataclass(frozen=True, slots=True)
class Compared:
    """One run, without what only its summary and curves need: `requests` have no gaps."""

    label: str  # says so if it was simulated
    run: RunInfo
    requests: list[RequestRow]
    steps: StepDigest
    summary: dict[str, Any]
    ttft_s: Curve  # of all requests: it ends below 1 if some had no first token
    tbt_ms: Curve


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs of which the first is the baseline, and what to bear in mind about them."""

    runs: list[Compared]
    notes: list[str]

    def table(self) -> list[tuple[Metric, list[Cell]]]:
        """The metrics that some run has, each with a cell per run."""
        rows = [(metric, _cells(metric, self.runs)) for metric in METRICS]
        return [row for row in rows if any(cell.value is not None for cell in row[1])]

    def to_json(self) -> dict[str, Any]:
        ratios = [(metric.title, cells) for metric, cells in self.table()]
        return {
            "baseline": self.runs[0].label,
            "notes": self.notes,
            "how_to_read": NOTES,
            "runs": [
                {
                    "label": one.label,
                    "run": one.run.to_json(),
                    "summary": {k: v for k, v in one.summary.items() if k != "notes"},
                    "ratios_to_baseline": {title: cells[i].ratio for title, cells in ratios},
                }
                for i, one in enumerate(self.runs)
            ],
        }


def compare(
    folders: Sequence[Path],
    baseline: str | None = None,
    slo_ttft_s: float | None = None,
    slo_tbt_ms: float | None = None,
) -> Comparison:
    """Read runs; the one called `baseline`, else the first, comes first.

    Objectives given here take the place of the runs' own. ConfigError as csps.records.rows'
    readers, and if no run is called `baseline`.
    """
    infos = [read_run(folder) for folder in folders]
    names = _names(infos, folders)
    order = [*range(len(folders))]
    if baseline is not None:
        if baseline not in names:
            raise ConfigError(f"--baseline: no run is called {baseline!r}: {', '.join(names)}")
        order.sort(key=lambda i: names[i] != baseline)
    runs = []
    for i in order:
        own = infos[i]
        objectives = {
            "slo_ttft_s": own.slo_ttft_s if slo_ttft_s is None else slo_ttft_s,
            "slo_tbt_ms": own.slo_tbt_ms if slo_tbt_ms is None else slo_tbt_ms,
        }
        runs.append(_read(folders[i], replace(own, **objectives), names[i]))
    return Comparison(runs, _notes(runs))


def number(value: float) -> str:
    """Three digits, or a whole number."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _names(infos: Sequence[RunInfo], folders: Sequence[Path]) -> list[str]:
    """The runs' own, or where two have the same, their folders'."""
    names = [info.name for info in infos]
    return [
        name if names.count(name) == 1 else str(folder)
        for name, folder in zip(names, folders, strict=True)
    ]


def _read(folder: Path, run: RunInfo, name: str) -> Compared:
    requests = read_requests(folder)
    steps = StepDigest(run, _window(requests)).take(iter_steps(folder))
    return Compared(
        label=f"{name} (simulated)" if run.simulated else name,
        run=run,
        requests=[replace(row, gaps_ms=()) for row in requests],
        steps=steps,
        summary=summarize_digest(run, requests, steps),
        ttft_s=curve(
            floats(row.ttft_s for row in requests if row.ttft_s is not None), len(requests)
        ),
        tbt_ms=curve(floats(chain.from_iterable(row.gaps_ms for row in requests))),
    )


def curve(values: Floats, total: int | None = None) -> Curve:
    """What a line through `values` needs: evenly spread ones, and more towards the largest."""
    ordered = np.sort(values)
    count = len(ordered)
    if not count:
        return Curve(ordered, ordered)
    even = np.linspace(0, count - 1, CURVE_POINTS)
    tail = count - np.geomspace(1, count, CURVE_POINTS)
    chosen = np.unique(np.concatenate((even, tail)).astype(np.int64))
    return Curve(ordered[chosen], (chosen + 1) / (total or count))


def _window(requests: Sequence[RequestRow]) -> tuple[float, float] | None:
    """The prefill of the longest prompt, and a little around it."""
    begun = [row for row in requests if row.ttft_s is not None]
    if not begun:
        return None
    longest = max(begun, key=lambda row: row.prompt_tokens)
    stop = longest.sent_s + (longest.ttft_s or 0.0)
    start = max(longest.sent_s + (longest.queue_s or 0.0), stop - MAX_WINDOW_S)
    margin = 0.1 * (stop - start)
    return start - margin, stop + margin


def _notes(runs: Sequence[Compared]) -> list[str]:
    notes = []
    if simulated := [one.label for one in runs if one.run.simulated]:
        notes.append("times of a cost model, not of clocks: " + ", ".join(simulated))
    for name in _ALIKE:
        found = {one.label: getattr(one.run, name) for one in runs}
        if len(set(found.values())) > 1:
            texts = (f"{label}: {value}" for label, value in found.items())
            notes.append(f"the runs differ in {name}: {', '.join(texts)}")
    for one in runs:
        if one.run.interrupted:
            notes.append(f"{one.label} was interrupted")
        if one.run.skipped_rows:
            notes.append(f"{one.label}: {one.run.skipped_rows} rows of the trace were left out")
    return notes


def _cells(metric: Metric, runs: Sequence[Compared]) -> list[Cell]:
    cells = []
    base: float | None = None
    for i, one in enumerate(runs):
        *parents, name = metric.path
        found: Any = one.summary
        for key in parents:
            found = (found or {}).get(key)
        found = found or {}
        value = found.get(name)
        base = value if i == 0 else base
        known = value is not None and base and metric.lower is not None
        ratio = value / base if known else None
        cells.append(Cell(value, ratio, name in found.get("at_least", ())))
    return cells


def best(metric: Metric, cells: Sequence[Cell]) -> set[int]:
    """Which of the runs do best at it; none where all are alike or nothing can be said."""
    values = {i: cell.value for i, cell in enumerate(cells) if cell.value is not None}
    if metric.lower is None or len(set(values.values())) < 2:
        return set()
    wanted = min(values.values()) if metric.lower else max(values.values())
    return {i for i, value in values.items() if value == wanted and not cells[i].at_least}


def texts(cell: Cell) -> tuple[str, str]:
    """Of a table: the figure, and its ratio."""
    if cell.value is None:
        return "-", ""
    ratio = "" if cell.ratio is None else f"×{cell.ratio:.{2 if cell.ratio >= 0.1 else 3}f}"
    return ("≥ " if cell.at_least else "") + number(cell.value), ratio
