"""What the figures have in common: marks that differ without colour, axes, panels."""

from math import ceil, isfinite
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter


class Mark(NamedTuple):
    """Of one run, or one kind of bytes."""

    color: str
    line: Any
    marker: str
    hatch: str


# From dark to light and back, so that neighbours differ in grey too.
MARKS = (
    Mark("#1b4f8f", "-", "o", ""),
    Mark("#e08a1e", "--", "s", "//"),
    Mark("#2f6b2b", "-.", "^", ".."),
    Mark("#b784c9", ":", "D", "xx"),
    Mark("#8c1c13", (0, (5, 1)), "v", "--"),
    Mark("#4fb3ac", (0, (3, 1, 1, 1)), "P", "\\\\"),
    Mark("#444444", (0, (1, 1)), "X", "oo"),
    Mark("#c9b12b", (0, (8, 2, 2, 2)), "*", "++"),
)


def mark(index: int) -> Mark:
    return MARKS[index % len(MARKS)]


def log_axis(panel: Axes, name: str) -> None:
    """A logarithmic axis with plain numbers on it, where there is anything above 0 to show."""
    axis: Axis = panel.xaxis if name == "x" else panel.yaxis
    if not isfinite(axis.get_minpos()):
        return
    panel.set(**{f"{name}scale": "log"})
    low, high = panel.get_xlim() if name == "x" else panel.get_ylim()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def panels(
    count: int, width: float, height: float, columns: int, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, each so large in inches, in rows of at most `columns`."""
    columns = min(columns, count)
    rows = ceil(count / columns)
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    cells = [cell for row in grid for cell in row]
    for cell in cells[count:]:
        cell.remove()
    for cell in cells[max(count - columns, 0) : count]:
        cell.tick_params(labelbottom=True)  # shared axes have them in the last row alone
    return figure, cells[:count]


def legend_below(figure: Figure, panel: Axes, columns: int = 4) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))
