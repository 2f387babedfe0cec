"""A trace at a glance: one figure, PNG or SVG, readable in grey."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from csps.core.errors import ConfigError
from csps.trace.schema import Trace

SUFFIXES = (".png", ".svg")
NUM_BINS = 60  # of arrivals over time


def draw_trace(trace: Trace, path: Path) -> None:
    """Lengths, arrivals and prompts over time. ConfigError if `path` cannot be written."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--figure: expected a name in {' or '.join(SUFFIXES)}, got {path}")
    # Text stays text, and the same trace gives the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "csps"}):
        figure = Figure(figsize=(12, 3.8))
        lengths, arrivals, prompts = figure.subplots(1, 3)
        _draw_lengths(trace, lengths)
        _draw_arrivals(trace, arrivals)
        _draw_prompts(trace, prompts)
        figure.suptitle(f"{trace.name}: {len(trace.requests):,} requests")
        figure.tight_layout()
        try:
            if path.suffix == ".svg":
                figure.savefig(path, metadata={"Date": None})
            else:
                figure.savefig(path, dpi=110)
        except OSError as error:
            raise ConfigError(f"--figure: {path}: {error.strerror}") from None


def _draw_lengths(trace: Trace, axes: Axes) -> None:
    _draw_cdf(axes, [r.prompt_tokens for r in trace.requests], "prompt", "-", "#1b4f8f")
    _draw_cdf(axes, [r.output_tokens for r in trace.requests], "output", "--", "#c46a10")
    axes.set(xscale="log", xlabel="tokens", ylabel="share of requests", ylim=(0, 1))
    axes.grid(color="0.9")
    axes.legend()


def _draw_cdf(axes: Axes, tokens: Sequence[int], label: str, line: str, color: str) -> None:
    shares = [(index + 1) / len(tokens) for index in range(len(tokens))]
    axes.step(sorted(tokens), shares, where="post", label=label, linestyle=line, color=color)


def _draw_arrivals(trace: Trace, axes: Axes) -> None:
    width_s = max(trace.requests[-1].arrival_s / NUM_BINS, 1e-6)
    counts = Counter(min(int(r.arrival_s / width_s), NUM_BINS - 1) for r in trace.requests)
    edges = [index * width_s for index in range(NUM_BINS + 1)]
    rates = [counts[index] / width_s for index in range(NUM_BINS)]
    axes.stairs(rates, edges, fill=True, color="0.6")
    axes.set(xlabel="seconds", ylabel="requests per second")
    axes.grid(color="0.9")


def _draw_prompts(trace: Trace, axes: Axes) -> None:
    for label, marker, color, later in (
        ("first turn", ".", "#8db3d6", False),
        ("later turn", "x", "#8a3b00", True),
    ):
        shown = [r for r in trace.requests if (r.turn > 1) == later]
        if shown:
            axes.plot(
                [r.arrival_s for r in shown],
                [r.prompt_tokens for r in shown],
                linestyle="none",
                marker=marker,
                markersize=3,
                color=color,
                label=label,
                rasterized=True,  # thousands of points would make a huge SVG
            )
    axes.set(yscale="log", xlabel="seconds", ylabel="prompt tokens")
    axes.grid(color="0.9")
    axes.legend()
