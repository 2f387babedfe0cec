"""What `bench layouts` makes of its runs and of the servers' step logs."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from csps.bench.layouts import MODEL, VARIANTS, Run
from csps.percentiles import percentile
from csps.records.rows import iter_steps

Row = dict[str, object]


class Step(NamedTuple):
    """A step of a measured run, from a step log. Seconds; `seconds` of its slowest rank."""

    size: int  # of the run
    layout: str
    shape: tuple[int, int, int, int]  # tokens, sequences, pairs, keys
    predicted_s: Mapping[str, float]  # by layout; empty without a cost model
    seconds: float

    @property
    def is_decode(self) -> bool:
        """Whether every sequence had one new token; otherwise it held prefill chunks."""
        return self.shape[2] == 0

    @property
    def is_whole_batch(self) -> bool:
        return self.is_decode and self.shape[1] == self.size


class Error(NamedTuple):
    """A prediction beside what was measured: predicted / measured - 1."""

    layout: str
    size: int
    is_decode: bool
    relative: float


def read_steps(folder: Path, runs: Iterable[Run]) -> list[Step]:
    """The steps that ended within one of the runs; those of warming up are left out."""
    windows = [(run.begun, run.ended, run.size) for run in runs]
    return [
        Step(
            size,
            row.layout,
            (row.num_tokens, row.num_sequences, row.num_pairs, row.num_keys),
            row.predicted_s,
            max(row.wall_s),
        )
        for row in iter_steps(folder)
        for begun, ended, size in windows
        if begun <= row.ended_s <= ended
    ]


def errors_of_chosen(steps: Iterable[Step]) -> list[Error]:
    """Of the layout that each step of the cost model's server ran in."""
    return [_error(step, step.predicted_s) for step in steps if step.predicted_s]


def errors_on_fixed(steps: Iterable[Step], fixed: Iterable[Step]) -> list[Error]:
    """Of the other servers' steps, where the cost model's server had a step of the same shape.

    They show how good the prediction was for a layout that was not chosen.
    """
    predicted = {step.shape: step.predicted_s for step in steps if step.predicted_s}
    return [_error(step, predicted[step.shape]) for step in fixed if step.shape in predicted]


def _error(step: Step, predicted_s: Mapping[str, float]) -> Error:
    relative = predicted_s[step.layout] / step.seconds - 1
    return Error(step.layout, step.size, step.is_decode, relative)


def error_table(errors: Sequence[Error]) -> list[Row]:
    """By layout: decode steps of all numbers of streams and of each, and steps with prefill."""
    rows: list[Row] = []
    for layout in sorted({error.layout for error in errors}):
        mine = [error for error in errors if error.layout == layout]
        decodes = [error for error in mine if error.is_decode]
        groups: dict[str, list[Error]] = {
            "all": mine,
            "decode": decodes,
            "with prefill": [error for error in mine if not error.is_decode],
        }
        for size in sorted({error.size for error in decodes}):
            groups[f"decode {size}"] = [e for e in decodes if e.size == size]
        rows += [
            {"layout": layout, "steps of": name, **_spread([error.relative for error in group])}
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


def size_table(runs: Sequence[Run], steps: Mapping[str, Sequence[Step]]) -> list[Row]:
    """A row per size of which every server has a run: TBT, step times, what was chosen.

    `steps`: of each server.
    """
    rows: list[Row] = []
    for size in sorted({run.size for run in runs}):
        mine = {name: [r for r in runs if (r.variant, r.size) == (name, size)] for name in VARIANTS}
        if not all(mine.values()):
            continue
        tbt = {
            name: percentile([*chain.from_iterable(run.gaps_ms for run in found)], 0.5)
            for name, found in mine.items()
        }
        whole = {
            name: [s for s in steps[name] if s.size == size and s.is_whole_batch] for name in mine
        }
        step_ms = {
            name: 1e3 * percentile([step.seconds for step in found], 0.5)
            for name, found in whole.items()
        }
        rows.append(
            {
                "size": size,
                "tbt_ms_p50": tbt,
                "ratio": _over_better(tbt),
                "step_ms_p50": step_ms,
                "step_ratio": _over_better(step_ms),
                "chosen": dict(Counter(step.layout for step in whole[MODEL])),
                "tbt_ms_p50_by_round": {
                    name: [percentile(run.gaps_ms, 0.5) for run in found]
                    for name, found in mine.items()
                },
            }
        )
    return rows


def _over_better(values: Mapping[str, float]) -> float | None:
    """The cost model's over the better fixed layout's; None where nothing was measured."""
    better = min(value for name, value in values.items() if name != MODEL)
    return values[MODEL] / better if better else None
