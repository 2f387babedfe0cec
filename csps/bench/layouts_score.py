"""What `bench layouts` makes of the server's step log."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from csps.bench.layouts import Run
from csps.core.plan import Layout
from csps.percentiles import percentile
from csps.records.rows import iter_steps

RESAMPLES = 2000  # of the bootstrap

Row = dict[str, object]


class Step(NamedTuple):
    """A step of a measured run, from the step log. Seconds; `seconds` of its slowest rank."""

    size: int  # of the run
    round: int
    layout: str
    shape: tuple[int, int, int, int]  # tokens, sequences, pairs, keys
    predicted_s: Mapping[str, float]  # by layout
    seconds: float

    @property
    def is_decode(self) -> bool:
        """Whether every sequence had one new token; otherwise it held prefill chunks."""
        return self.shape[2] == 0

    @property
    def is_whole_batch(self) -> bool:
        return self.is_decode and self.shape[1] == self.size

    @property
    def chosen(self) -> str:
        """The layout that the cost model would have it in."""
        return min(self.predicted_s, key=self.predicted_s.__getitem__)

    @property
    def error(self) -> float:
        """Predicted / measured - 1, of the layout it had."""
        return self.predicted_s[self.layout] / self.seconds - 1


def read_steps(folder: Path, runs: Iterable[Run]) -> list[Step]:
    """The steps that ended within one of the runs, in order; those of warming up are left out."""
    windows = [(run.begun, run.ended, run) for run in runs]
    return [
        Step(
            run.size,
            run.round,
            row.layout,
            (row.num_tokens, row.num_sequences, row.num_pairs, row.num_keys),
            row.predicted_s,
            max(row.wall_s),
        )
        for row in iter_steps(folder)
        for begun, ended, run in windows
        if begun <= row.ended_s <= ended
    ]


def error_table(steps: Sequence[Step]) -> list[Row]:
    """By layout: decode steps of all numbers of streams and of each, and steps with prefill."""
    rows: list[Row] = []
    for layout in sorted({step.layout for step in steps}):
        mine = [step for step in steps if step.layout == layout]
        decodes = [step for step in mine if step.is_decode]
        groups = {
            "all": mine,
            "decode": decodes,
            "with prefill": [step for step in mine if not step.is_decode],
        }
        for size in sorted({step.size for step in decodes}):
            groups[f"decode {size}"] = [step for step in decodes if step.size == size]
        rows += [
            {"layout": layout, "steps of": name, **_spread([step.error for step in group])}
            for name, group in groups.items()
            if group
        ]
    return rows


def _spread(relative: Sequence[float]) -> Row:
    sizes = [abs(value) for value in relative]
    return {
        "steps": len(relative),
        "median": percentile(sizes, 0.5),
        "p90": percentile(sizes, 0.9),
        "signed median": percentile(relative, 0.5),  # above 0: predicted too slow
    }


def size_table(steps: Sequence[Step]) -> list[Row]:
    """A row per size, of steps with the whole batch: times, what was chosen, what that cost.

    `sp_over_tp`: the median over neighbouring steps of unlike layout, with a 95% interval
    (bootstrap). `over_better`: the step times of the layouts chosen, each by its share, over the
    better layout's; 1.0 where that was always the choice.
    """
    rows: list[Row] = []
    for size in sorted({step.size for step in steps}):
        mine = [step for step in steps if step.size == size and step.is_whole_batch]
        ratios = _ratios(mine)
        if not ratios:
            continue
        low, middle, high = _median_interval(ratios)
        chosen = Counter(step.chosen for step in mine)
        cost = {Layout.SP: middle, Layout.TP: 1.0}
        mean = sum(cost[Layout(name)] * count for name, count in chosen.items()) / len(mine)
        rows.append(
            {
                "size": size,
                "step_ms_p50": {
                    layout: 1e3 * percentile([s.seconds for s in mine if s.layout == layout], 0.5)
                    for layout in (Layout.SP, Layout.TP)
                },
                "pairs": len(ratios),
                "sp_over_tp": {"low": low, "p50": middle, "high": high},
                "chosen": dict(chosen),
                "over_better": mean / min(cost.values()),
            }
        )
    return rows


def _ratios(steps: Sequence[Step]) -> list[float]:
    """SP's seconds over TP's, of every two neighbours of one batch that have either."""
    found = []
    for one, other in pairwise(steps):
        if one.layout != other.layout and one.round == other.round:
            ratio = one.seconds / other.seconds
            found.append(ratio if one.layout == Layout.SP else 1 / ratio)
    return found


def _median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median between the ends of its 95% interval."""
    drawn = np.random.default_rng(0).choice(values, size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(np.median(values)), float(high)
