"""All figures of a comparison, drawn from records alone: PNG and SVG, readable in grey."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from csps.records.comparison import Comparison
from csps.records.figures_latency import cdfs, rate_latency, ttft_by_prompt
from csps.records.figures_steps import bytes_moved, occupancy, timeline

# Text stays text, and the same records give the same bytes.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "csps",
    "font.size": 9.0,
    "savefig.dpi": 110,
}


class Drawing(NamedTuple):
    """A figure: its name among the files, and what it shows. None if there is nothing to draw."""

    name: str
    caption: str
    draw: Callable[[Comparison], Figure | None]


class Drawn(NamedTuple):
    """A figure's files."""

    name: str
    caption: str
    svg: Path
    png: Path


DRAWINGS = (
    Drawing(
        "cdf",
        "Share of requests with a first token by then (a line that ends below 1: some never had "
        "one), and share of the gaps between tokens that were at most, and longer than, so long.",
        cdfs,
    ),
    Drawing(
        "ttft_by_prompt",
        "TTFT of each request against its prompt, and the median by powers of two; the first "
        "run's median is repeated, dashed. Requests without a first token are not shown.",
        ttft_by_prompt,
    ),
    Drawing(
        "rate_latency",
        "Latencies over the rate of requests, a line for runs that differ in nothing else. A "
        "hollow mark is a lower bound: some requests had not ended when the run did.",
        rate_latency,
    ),
    Drawing(
        "timeline",
        "What each rank did in each lane while the longest prompt was prefilled: white is idle. "
        "Within a step, compute is drawn before exposed communication.",
        timeline,
    ),
    Drawing(
        "kv_occupancy",
        "Share of each rank's KV pages that is in use, the most in each part of the run.",
        occupancy,
    ),
    Drawing(
        "bytes",
        "Bytes that all ranks sent, by kind, in the steps of which it is known what exact "
        "attention would have sent (black mark).",
        bytes_moved,
    ),
)


def draw_all(comparison: Comparison, folder: Path) -> list[Drawn]:
    """Draw what the records have something for."""
    drawn = []
    with mpl.rc_context(STYLE):
        for drawing in DRAWINGS:
            figure = drawing.draw(comparison)
            if figure is None:
                continue
            svg, png = (folder / f"{drawing.name}.{suffix}" for suffix in ("svg", "png"))
            figure.savefig(svg, metadata={"Date": None})
            figure.savefig(png)
            drawn.append(Drawn(drawing.name, drawing.caption, svg, png))
    return drawn
