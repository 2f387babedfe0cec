"""Draw what sparse prefill saves against what it loses, from JSONs of `csps bench quality`.

    python scripts/plot_frontier.py docs/results/frontier_*.json --out docs/img/frontier

writes OUT.svg and OUT.png. One line per way to estimate; a point is one gamma (or window), the
mean over the texts, its bar the standard error of that mean. TTFT is over that of dense
attention on the same text in the same run.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

COSTS = {
    "density": "density (kept pairs / causal pairs)",
    "bytes": "bytes received / dense KV (mean of ranks)",
    "ttft": "TTFT / dense",
}
STYLES = {  # readable in grey
    "csa, sampled rows": {"marker": "o", "linestyle": "-", "color": "#1b4f8f"},
    "csa, mean keys": {"marker": "s", "linestyle": "--", "color": "#c46a10"},
    "csa-distance": {"marker": "^", "linestyle": ":", "color": "#3a7d34"},
}


class Point(NamedTuple):
    """One way to attend with one parameter, over all texts."""

    label: str
    costs: dict[str, float]
    loss: float  # mean perplexity over dense
    error: float  # standard error of that mean


def read_points(path: Path) -> dict[str, list[Point]]:
    """Points of each line, in the order of their density. SystemExit if `path` holds no ppl."""
    record = json.loads(path.read_text())
    if record.get("bench") != "quality" or "ppl" not in record["parameters"]["tasks"].split(","):
        raise SystemExit(f"{path}: is not a JSON of csps bench quality with the task ppl")
    flags = record["parameters"]["server"]
    by_means = "--csa-estimate" in flags and flags[flags.index("--csa-estimate") + 1] == "means"
    texts: dict[str, dict[int, Any]] = {}
    for row in record["results"]["prompts"]:
        texts.setdefault(row["variant"], {})[row["index"]] = row
    dense = texts.pop("dense")
    lines: dict[str, list[Point]] = {}
    for variant, rows in texts.items():
        kind, _, label = variant.partition(" ")
        name = (
            "csa-distance"
            if kind != "csa"
            else f"csa, {'mean keys' if by_means else 'sampled rows'}"
        )
        lines.setdefault(name, []).append(_point(label, rows, dense))
    for points in lines.values():
        points.sort(key=lambda point: point.costs["density"])
    return lines


def _point(label: str, rows: dict[int, Any], dense: dict[int, Any]) -> Point:
    ratios = [row["ppl"]["over_dense"] for row in rows.values()]
    costs = {
        "density": fmean(row["sparse"]["density"] for row in rows.values()),
        "bytes": fmean(row["received_over_dense_kv_mean"] for row in rows.values()),
        "ttft": fmean(row["ttft_s"] / dense[index]["ttft_s"] for index, row in rows.items()),
    }
    error = stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0
    return Point(label, costs, fmean(ratios), error)


def draw(lines: dict[str, list[Point]], out: Path) -> None:
    """One panel per cost, perplexity up."""
    # Text stays text, and the same data give the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "csps"})
    figure = Figure(figsize=(12, 4.2))
    panels = figure.subplots(1, len(COSTS), sharey=True)
    for panel, (cost, title) in zip(panels, COSTS.items(), strict=True):
        for name, points in lines.items():
            x, y = [point.costs[cost] for point in points], [point.loss for point in points]
            errors = [point.error for point in points]
            panel.errorbar(x, y, errors, label=name, capsize=2, markersize=5, **STYLES[name])
            for point in points:
                at = (point.costs[cost], point.loss)
                panel.annotate(
                    point.label, at, xytext=(3, 5), textcoords="offset points", fontsize=7
                )
        panel.axhline(1.0, color="0.5", linewidth=0.8)
        panel.set_xlabel(title)
        panel.grid(color="0.9")
    panels[0].set_ylabel("perplexity / dense")
    panels[0].legend()
    figure.tight_layout()
    for suffix, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 110})):
        figure.savefig(out.with_suffix(suffix), **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSONs of csps bench quality")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    args = parser.parse_args()
    lines: dict[str, list[Point]] = {}
    for path in args.results:
        for name, points in read_points(path).items():
            if name in lines:
                raise SystemExit(f"{path}: {name} stands in an earlier file too")
            lines[name] = points
    draw(lines, args.out)


if __name__ == "__main__":
    main()
