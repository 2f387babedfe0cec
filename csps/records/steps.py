"""What the steps of a run sum up to, taken in one pass: there may be millions of them."""

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from csps.core.plan import Lane
from csps.records.rows import StepRow
from csps.records.run import RunInfo
from csps.records.spread import nearest_rank

NUM_BINS = 400  # of a run's time, for what is drawn over it


@dataclass(slots=True)
class LaneSums:
    """Seconds are summed over ranks, but `busy_s`: in which the lane had a step, by replica."""

    num_steps: int = 0
    num_tokens: int = 0
    busy_s: float = 0.0
    wall_s: float = 0.0
    compute_s: float = 0.0
    comm_s: float = 0.0
    exposed_comm_s: float = 0.0
    bytes_sent: int = 0
    compared_bytes: int = 0  # sent in the steps of which `dense_bytes` is known
    dense_bytes: int = 0

    def add(self, row: StepRow, busy_s: float) -> None:
        self.num_steps += 1
        self.num_tokens += row.num_tokens
        self.busy_s += busy_s
        self.wall_s += sum(row.wall_s)
        self.compute_s += sum(row.compute_s)
        self.comm_s += sum(row.comm_s)
        self.exposed_comm_s += sum(row.exposed_comm_s)
        sent = sum(row.bytes_sent.values())
        self.bytes_sent += sent
        if row.dense_bytes is not None:
            self.compared_bytes += sent
            self.dense_bytes += row.dense_bytes

    def summary(self) -> dict[str, Any]:
        return {
            "steps": self.num_steps,
            "tokens": self.num_tokens,
            "busy_s": self.busy_s,
            "tokens_per_busy_s": _ratio(self.num_tokens, self.busy_s),
            "wall_s": self.wall_s,
            "compute_s": self.compute_s,
            "comm_s": self.comm_s,
            "exposed_comm_s": self.exposed_comm_s,
            "exposed_share": _ratio(self.exposed_comm_s, self.wall_s),
            "bytes_sent": self.bytes_sent,
            "dense_bytes": self.dense_bytes if self.compared_bytes or self.dense_bytes else None,
            "bytes_against_dense": _ratio(self.compared_bytes, self.dense_bytes),
        }


@dataclass(slots=True)
class Weighted:
    """A mean of shares, and the least of them."""

    weight: float = 0.0
    total: float = 0.0
    least: float | None = None

    def add(self, share: float | None, weight: float) -> None:
        if share is not None:
            self.weight += weight
            self.total += weight * share
            self.least = share if self.least is None else min(self.least, share)

    @property
    def mean(self) -> float | None:
        return _ratio(self.total, self.weight)


@dataclass(slots=True)
class StepDigest:
    """Takes steps one by one. `window`: seconds of the run whose steps are kept for a figure.

    `occupancy`: by replica and rank, the largest share of its KV pages in use in each of NUM_BINS
    parts of the run, NaN where no step ended.
    """

    run: RunInfo
    window: tuple[float, float] | None = None
    lanes: dict[Lane, LaneSums] = field(default_factory=lambda: defaultdict(LaneSums))
    bytes_sent: Counter[str] = field(default_factory=Counter)
    compared_bytes: Counter[str] = field(default_factory=Counter)  # where `dense_bytes` is known
    density: Weighted = field(default_factory=Weighted)
    recall: Weighted = field(default_factory=Weighted)
    errors: dict[str, "array[float]"] = field(default_factory=lambda: defaultdict(_floats))
    occupancy: dict[tuple[int, int], list[float]] = field(
        default_factory=lambda: defaultdict(_bins)
    )
    kept: list[StepRow] = field(default_factory=list)
    _ended_s: dict[tuple[int, Lane], float] = field(default_factory=dict)

    def take(self, rows: Iterable[StepRow]) -> "StepDigest":
        for row in rows:
            self.add(row)
        return self

    def add(self, row: StepRow) -> None:
        # Steps of a lane overlap where the next is sent before the last has ended.
        begun = max(row.started_s, self._ended_s.get((row.replica, row.lane), row.started_s))
        self._ended_s[row.replica, row.lane] = max(begun, row.ended_s)
        self.lanes[row.lane].add(row, max(row.ended_s - begun, 0.0))
        for kind, sent in row.bytes_sent.items():
            self.bytes_sent[kind] += sent
            if row.dense_bytes is not None:
                self.compared_bytes[kind] += sent
        self.density.add(row.density, row.num_pairs)
        self.recall.add(row.recall, row.num_tokens)
        measured = max(row.wall_s, default=row.ended_s - row.started_s)
        predicted = row.predicted_s.get(row.layout)
        if predicted is not None and measured > 0:
            self.errors[row.layout].append(predicted / measured - 1)
        self._occupy(row)
        if self.window and row.ended_s > self.window[0] and row.started_s < self.window[1]:
            self.kept.append(row)

    def _occupy(self, row: StepRow) -> None:
        if not self.run.pages_per_rank or not self.run.elapsed_s:
            return
        at = int(row.ended_s / self.run.elapsed_s * NUM_BINS)
        at = min(max(at, 0), NUM_BINS - 1)
        for rank, pages in enumerate(row.kv_pages):
            bins = self.occupancy[row.replica, rank]
            share = pages / self.run.pages_per_rank
            if not bins[at] >= share:  # NaN too
                bins[at] = share

    def summary(self) -> dict[str, Any] | None:
        """None if there were no steps."""
        if not self.lanes:
            return None
        compared = sum(lane.compared_bytes for lane in self.lanes.values())
        dense = sum(lane.dense_bytes for lane in self.lanes.values())
        return {
            "lanes": {name.value: lane.summary() for name, lane in sorted(self.lanes.items())},
            "bytes_by_kind": dict(sorted(self.bytes_sent.items())),
            "bytes_against_dense": _ratio(compared, dense),
            "density": self.density.mean,
            "recall": {"mean": self.recall.mean, "min": self.recall.least},
            "prediction_error": {
                str(layout): _errors(found) for layout, found in sorted(self.errors.items())
            },
            "kv_share_max": float(np.nanmax([*self.occupancy.values()]))
            if self.occupancy
            else None,
        }


def _bins() -> list[float]:
    return [float("nan")] * NUM_BINS


def _floats() -> "array[float]":
    return array("d")


def _errors(found: "array[float]") -> dict[str, float]:
    """Of predicted / measured - 1: `bias` is its mean, the others are of its absolute value."""
    errors = np.frombuffer(found, dtype=np.float64)
    size = np.sort(np.abs(errors))
    return {
        "count": len(errors),
        "bias": float(errors.mean()),
        "mean": float(size.mean()),
        "p50": nearest_rank(size, 0.5),
        "p90": nearest_rank(size, 0.9),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
