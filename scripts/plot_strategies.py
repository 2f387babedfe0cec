"""Draw how long users wait under each strategy, from the JSON of `csps bench strategies`.

    python scripts/plot_strategies.py docs/results/strategies.json --out docs/img/strategies

writes OUT.svg, with --png OUT.png too. One line per strategy, in its best configuration: the
share of chats and of documents whose first token had come after a time, and the share of gaps
between tokens, of all requests, that were longer than a time. A request that had not ended
counts in the shares; a line that does not reach 1 says that some never had a first token.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

STYLES = {  # readable in grey
    "csps": {"linestyle": "-", "color": "#1b4f8f", "linewidth": 2.2},
    "ring": {"linestyle": "--", "color": "#3a7d34", "linewidth": 1.6},
    "sarathi": {"linestyle": "-.", "color": "#c46a10", "linewidth": 1.6},
    "shift": {"linestyle": ":", "color": "#7a3b8f", "linewidth": 2.0},
}
KINDS = {"chat": "chats", "document": "documents"}


def read_best(path: Path) -> list[dict[str, Any]]:
    """The best configuration of each strategy. SystemExit if `path` is no such JSON."""
    record = json.loads(path.read_text())
    if record.get("bench") != "strategies":
        raise SystemExit(f"{path}: is not a JSON of csps bench strategies")
    best = {c["strategy"]: c for c in record["results"]["configurations"] if c["best"]}
    return [best[strategy] for strategy in STYLES if strategy in best]


def first_tokens(configuration: dict[str, Any], kind: str) -> tuple[list[float], list[float]]:
    """TTFTs in order, and the share of all requests of that kind which had theirs by then."""
    requests = [row for row in configuration["requests"] if row["kind"] == kind]
    known = sorted(row["ttft_s"] for row in requests if row["output_tokens"])
    # Up from 0 at the first.
    return known[:1] + known, [i / len(requests) for i in range(len(known) + bool(known))]


def gaps(configuration: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Gaps in order, and the share of gaps at least as long."""
    known = sorted(gap for row in configuration["requests"] for gap in row["gaps_ms"])
    return known, [1 - i / len(known) for i in range(len(known))]


def draw(configurations: Sequence[dict[str, Any]], out: Path, png: bool) -> None:
    """Three panels: chats' and documents' first tokens, everyone's gaps."""
    # Text stays text, and the same data give the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "csps"})
    figure = Figure(figsize=(12, 4.2))
    *waits, stalls = figure.subplots(1, len(KINDS) + 1)
    # Each strategy is named at another height, so that no name is over another.
    numbers = range(1, len(configurations) + 1)
    heights = [number / (len(numbers) + 1) for number in numbers]
    for panel, (kind, title) in zip(waits, KINDS.items(), strict=True):
        panel.set(ylim=(0, 1.02), xlabel="TTFT (s)", title=title)
        panel.set_ylabel("share with a first token by then")
        found = [first_tokens(c, kind) for c in configurations]
        _lines(panel, configurations, found, "post", heights)
    stalls.set(yscale="log", xlabel="TBT (ms)", ylabel="share of gaps at least as long")
    stalls.set_title("chats and documents")
    found = [gaps(c) for c in configurations]
    _lines(stalls, configurations, found, "pre", [0.5**number for number in numbers])
    stalls.axhline(0.01, color="0.5", linewidth=0.8)
    stalls.annotate("p99", (0.99, 0.01), xycoords=stalls.get_yaxis_transform(), ha="right",
                    va="bottom", fontsize=8)  # fmt: skip
    stalls.set_xlim(left=1.0)  # shorter ones are tokens that came together
    figure.legend(*waits[0].get_legend_handles_labels(), loc="lower center", ncols=len(STYLES))
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})
    if png:
        figure.savefig(out.with_suffix(".png"), dpi=110)


def _lines(
    panel: Axes,
    configurations: Sequence[dict[str, Any]],
    lines: Sequence[tuple[list[float], list[float]]],
    steps: str,
    heights: Sequence[float],
) -> None:
    panel.set_xscale("log")
    for configuration, (x, y), height in zip(configurations, lines, heights, strict=True):
        name, strategy = configuration["name"], configuration["strategy"]
        label = name if name.startswith(strategy) else f"{strategy} ({name})"
        panel.plot(x, y, label=label, drawstyle=f"steps-{steps}", **STYLES[strategy])
        if x:
            at = min(range(len(y)), key=lambda i: abs(y[i] - height))
            panel.annotate(
                strategy, (x[at], y[at]), xytext=(4, -2), textcoords="offset points", fontsize=8,
                color=STYLES[strategy]["color"],
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )  # fmt: skip
    left, right = panel.get_xlim()
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if right < 30 * left else (1,)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.grid(color="0.9")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON of csps bench strategies")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    parser.add_argument("--png", action="store_true", help="write OUT.png too")
    args = parser.parse_args()
    draw(read_best(args.results), args.out, args.png)


if __name__ == "__main__":
    main()
