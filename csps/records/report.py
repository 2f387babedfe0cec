"""One HTML file per comparison, with everything in it: tables, figures, how to read them."""

import base64
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from csps.core.errors import ConfigError
from csps.records.comparison import Comparison, best, number, texts
from csps.records.figures import Drawn, draw_all
from csps.records.run import RunInfo
from csps.records.summary import NOTES, save

REPORT_FILE = "report.html"
COMPARISON_FILE = "comparison.json"


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write report.html, comparison.json and the figures. ConfigError if that cannot be done."""
    save(folder / COMPARISON_FILE, comparison.to_json())
    path = folder / REPORT_FILE
    try:
        drawn = draw_all(comparison, folder)
        path.write_text(html(comparison, drawn), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from None
    return path


def html(comparison: Comparison, drawn: list[Drawn]) -> str:
    """The report; it refers to nothing outside itself."""
    text = files("csps.records").joinpath("report.html.j2").read_text(encoding="utf-8")
    # Names come from whoever made the traces: escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)  # fmt: skip
    rows = [
        {
            "title": metric.title,
            "unit": metric.unit,
            "wanted": {True: "lower", False: "higher", None: ""}[metric.lower],
            "cells": [
                {"value": value, "ratio": ratio, "best": i in best(metric, cells)}
                for i, (value, ratio) in enumerate(map(texts, cells))
            ],
        }
        for metric, cells in comparison.table()
    ]
    return environment.from_string(text).render(
        labels=[one.label for one in comparison.runs],
        notes=comparison.notes,
        rows=rows,
        settings=_settings([one.run for one in comparison.runs]),
        failures=[(one.label, one.summary["failures"]) for one in comparison.runs],
        buckets=_buckets(comparison),
        figures=[(figure.caption, _data_uri(figure), figure.name) for figure in drawn],
        reading=NOTES,
    )


def _settings(runs: list[RunInfo]) -> list[tuple[str, list[str]]]:
    """Rows of what was run, those that nobody has left out."""
    rows: dict[str, list[str]] = {}
    values = [run.to_json() for run in runs]
    for name in dict.fromkeys(key for one in values for key in one):
        rows[name] = [_text(one.get(name)) for one in values]
    return [(name, cells) for name, cells in rows.items() if any(cells)]


def _text(value: Any) -> str:
    if value is None or value == {}:
        return ""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    return str(value)


def _buckets(comparison: Comparison) -> list[dict[str, Any]]:
    """TTFT by prompt length: p50 and p99 of each run."""
    lengths = sorted({b["from_tokens"] for one in comparison.runs
                      for b in one.summary["ttft_by_prompt"]})  # fmt: skip
    rows = []
    for first in lengths:
        cells = []
        for one in comparison.runs:
            found = [b for b in one.summary["ttft_by_prompt"] if b["from_tokens"] == first]
            cells.append(" / ".join(_least(found[0], x) for x in ("p50", "p99")) if found else "-")
        counts = max(
            b["count"] for one in comparison.runs for b in one.summary["ttft_by_prompt"]
            if b["from_tokens"] == first
        )  # fmt: skip
        rows.append({"first": first, "last": 2 * first - 1, "count": counts, "cells": cells})
    return rows


def _least(spread: dict[str, Any], name: str) -> str:
    if spread[name] is None:
        return "-"
    return ("≥ " if name in spread["at_least"] else "") + number(spread[name])


def _data_uri(figure: Drawn) -> str:
    """Of the smaller file: SVG, unless it has very many shapes."""
    path, kind = min(
        (figure.svg, "image/svg+xml"), (figure.png, "image/png"),
        key=lambda file: file[0].stat().st_size,
    )  # fmt: skip
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
