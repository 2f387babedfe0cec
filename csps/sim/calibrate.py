"""Fits a calibrated cluster file to the steps of live runs.

For each lane of each strategy's server:

- *alone*: steps in whose time no other lane had a step give a CostModel per layout
  (csps.sched.cost.fit). Layouts that only occur beside another lane's steps are left out.
- *beside*: a step beside another lane's loses a share of its speed for as long as they overlap.
  The time that steps lost is that share times the time of the overlaps. It grows with the other
  step's new tokens: one token's step waits for memory and for messages most of its time.
- *delay_s*: what a step loses besides, whatever its size: a message that comes while the other
  lane's threads have the cores is seen late, and a step has so many messages.
- *spread_s*: what a decode step in layout SP takes besides where KV of some token is on several
  ranks, so that queries travel: its ranks wait for each other in every layer.
- *step_s*: between a step's end and the begin of its lane's next one's work while the lane is
  busy: the median of what a step's time on the coordinator's clock has beyond the ranks', and of
  the gaps before it.
"""

import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from csps.core.errors import ConfigError
from csps.core.plan import Lane, Layout
from csps.records.rows import StepRow, read_steps
from csps.records.run import RunInfo, RunKind, read_run
from csps.sched.cost import CostModel, Floats, Sample, StepShape, fit_with, non_negative
from csps.sim.cluster import MOST_LOST

# Steps of a kind that a model is fitted to at least, and that say something about another.
MIN_STEPS = 8
# A step counts as alone if it shared less of its time than this.
ALONE = 0.02
# A lane is idle if the next step begins so long after the last, in seconds.
IDLE_S = 0.02
# The other step's new tokens from which on a step may lose more of its speed.
BESIDE_TOKENS = (1, 2, 4, 8, 16, 256)


class Span(NamedTuple):
    """When a step worked, and on how many new tokens."""

    start: float
    stop: float
    num_tokens: int


class Timed(NamedTuple):
    """A step: its shape, its seconds on the slowest rank, and those beside another lane's steps
    of at least so many tokens as BESIDE_TOKENS says.
    """

    row: StepRow
    seconds: float
    beside_s: tuple[float, ...]

    @property
    def sample(self) -> Sample:
        row = self.row
        shape = StepShape(row.num_tokens, row.num_sequences, row.num_pairs, row.num_keys)
        return Sample(shape, self.seconds)

    @property
    def is_spread(self) -> bool:
        """Whether queries travelled in a decode step whose tokens have one rank each."""
        row = self.row
        own = row.lane is Lane.DECODE and row.layout is Layout.SP
        return own and any(row.bytes_sent.values())

    @property
    def alone(self) -> bool:
        return self.beside_s[0] <= ALONE * self.seconds

    @property
    def always_beside(self) -> bool:
        return self.beside_s[0] >= (1 - ALONE) * self.seconds


@dataclass(frozen=True, slots=True)
class LaneFit:
    """`errors`: median of |predicted / measured - 1| by layout, of the steps alone. `beside`: share
    of its speed that a step loses, by BESIDE_TOKENS, empty where none shared its time; `delay_s`:
    and seconds.
    """

    models: Mapping[Layout, CostModel]
    errors: Mapping[Layout, float]
    num_alone: Mapping[Layout, int]
    beside: tuple[float, ...]
    delay_s: float
    spread_s: float
    step_s: float


def timed_steps(rows: Sequence[StepRow]) -> list[Timed]:
    """The steps of one run, with what each shared. A step's work ends when the step does."""
    spans: dict[Lane, list[Span]] = {}
    for row in rows:
        span = Span(row.ended_s - max(row.wall_s), row.ended_s, row.num_tokens)
        spans.setdefault(row.lane, []).append(span)
    for found in spans.values():
        found.sort()
    timed = []
    for row in rows:
        seconds = max(row.wall_s)
        beside = np.zeros(len(BESIDE_TOKENS))
        for lane, found in spans.items():
            if lane is not row.lane:
                beside += _overlap(row.ended_s - seconds, row.ended_s, found)
        timed.append(Timed(row, seconds, tuple(np.minimum(beside, seconds).tolist())))
    return timed


def _overlap(start: float, stop: float, spans: Sequence[Span]) -> Floats:
    """Seconds of [start, stop) in `spans`, which are sorted and of one lane, so do not overlap;
    by BESIDE_TOKENS.
    """
    at = max(bisect_left(spans, (start, start, 0)) - 1, 0)
    total = np.zeros(len(BESIDE_TOKENS))
    while at < len(spans) and spans[at].start < stop:
        first, last, num_tokens = spans[at]
        total[: bisect_right(BESIDE_TOKENS, num_tokens)] += max(
            min(last, stop) - max(first, start), 0.0
        )
        at += 1
    return total


def fit_lane(steps: Sequence[Timed], gaps_s: Sequence[float]) -> LaneFit:
    """ConfigError if no layout has enough steps alone."""
    models, errors, nums, spread_s = {}, {}, {}, 0.0
    for layout in sorted({step.row.layout for step in steps}):
        alone = [s for s in steps if s.row.layout is layout and s.alone and s.seconds > 0]
        if len(alone) < MIN_STEPS:
            continue
        samples = [step.sample for step in alone]
        spread = np.array([[float(step.is_spread)] for step in alone])
        models[layout], (extra_s,) = fit_with(samples, spread)
        spread_s = max(spread_s, extra_s)  # of SP: in other layouts no step counts as spread
        predicted_s = [models[layout].predict(s.shape) for s in samples] + extra_s * spread[:, 0]
        seconds = np.array([sample.seconds for sample in samples])
        errors[layout] = float(np.median(np.abs(predicted_s / seconds - 1)))
        nums[layout] = len(alone)
    if not models:
        raise ConfigError(
            f"fewer than {MIN_STEPS} {steps[0].row.lane} steps ran alone: add a run with a lower "
            "rate"
        )
    found = [
        (step, models[step.row.layout].predict(step.sample.shape) + spread_s * step.is_spread)
        for step in steps
        if step.row.layout in models and not step.alone
    ]
    return LaneFit(models, errors, nums, *_lost(found), spread_s, statistics.median(gaps_s))


def _lost(found: Sequence[tuple[Timed, float]]) -> tuple[tuple[float, ...], float]:
    """Of its speed, by BESIDE_TOKENS; it never falls, so what was seen little is as what is less.
    And the delay, of a step that is beside another all the time. Of steps beside others, each with
    the seconds that it would have taken alone.

    Least squares of the time lost: long steps are what a lane's time goes to. Of the delay, by such
    steps only, relative to what they take alone: a slow one overlaps longer, whatever slowed it.
    """
    if not found:
        return (), 0.0
    whole = [(s.seconds / alone_s - 1, alone_s) for s, alone_s in found if s.always_beside]
    delay_s = 0.0
    if len(whole) >= MIN_STEPS:
        lost = np.array([part for part, _ in whole])
        delay_s = non_negative(np.array([(1.0, 1.0 / alone_s) for _, alone_s in whole]), lost)[1]
    overlaps, lost_s = [], []
    for step, alone_s in found:
        working = max(1.0 - delay_s / step.seconds, 0.0)  # of the time beside
        overlaps.append(np.array(step.beside_s) * working)
        lost_s.append(step.seconds - step.beside_s[0] * (1.0 - working) - alone_s)
    more = non_negative(np.array(overlaps), np.array(lost_s))
    return tuple(np.minimum(np.cumsum(more), MOST_LOST).tolist()), float(delay_s)


def lane_gaps(rows: Iterable[StepRow]) -> list[float]:
    """Seconds from a step's end to the begin of the next one's work, where the lane was busy."""
    ordered = sorted(rows, key=lambda row: row.started_s)
    return [
        max(row.ended_s - before.ended_s - max(row.wall_s), 0.0)
        for before, row in pairwise(ordered)
        if row.started_s - before.ended_s <= IDLE_S
    ]


def calibrate(folders: Sequence[Path], name: str) -> str:
    """The text of a cluster file. ConfigError names the folder of a run that does not fit."""
    runs: dict[str, list[tuple[RunInfo, list[StepRow]]]] = {}
    for folder in folders:
        info = read_run(folder)
        if info.kind is not RunKind.LIVE:
            raise ConfigError(f"{folder}: is simulated: calibrate from live runs")
        rows = read_steps(folder)
        if not rows:
            raise ConfigError(f"{folder}: has no steps")
        same = runs.setdefault(info.strategy, [])
        if same and _server(same[0][0]) != _server(info):
            raise ConfigError(f"{folder}: another server than that of {same[0][0].name}")
        same.append((info, rows))
    if not runs:
        raise ConfigError("no runs to calibrate from")
    models = {info.model for found in runs.values() for info, _ in found}
    if len(models) > 1:
        raise ConfigError(f"the runs are of several models: {', '.join(sorted(models))}")
    infos = [info for found in runs.values() for info, _ in found]
    sources = [info.name for info in infos]
    lines = [
        'kind = "calibrated"',
        f'name = "{name}"',
        f'model = "{models.pop()}"',
        f'source = "csps calibrate, from steps of live runs{_where(infos)}: {"; ".join(sources)}"',
    ]
    for strategy, found in runs.items():
        lines += _server_lines(strategy, found)
    return "\n".join(lines) + "\n"


def _where(infos: Iterable[RunInfo]) -> str:
    """The machines and commits of runs that name theirs."""
    known = {
        f"{info.machine['cpu']}, {info.machine['cores']} cores, commit {info.commit}"
        for info in infos
        if info.machine is not None
    }
    return f" ({'; '.join(sorted(known))})" if known else ""


def _server(info: RunInfo) -> tuple[object, ...]:
    given = (info.settings.get(name) for name in ("tp", "stage_tokens"))
    return info.model, info.ranks, *given, info.block_size, info.pages_per_rank


def _server_lines(strategy: str, runs: Sequence[tuple[RunInfo, list[StepRow]]]) -> list[str]:
    info = runs[0][0]
    tp = info.settings.get("tp", 1)
    lines = [
        "",
        "[[server]]",
        f'strategy = "{strategy}"',
        f"sp = {info.ranks // tp}",
        f"tp = {tp}",
        f"block_size = {info.block_size}",
        f"pages_per_rank = {info.pages_per_rank}",
        f"stage_tokens = {info.settings['stage_tokens']}",
    ]
    timed = [step for _, rows in runs for step in timed_steps(rows)]
    for lane in Lane:
        steps = [step for step in timed if step.row.lane is lane]
        if not steps:
            continue
        # Gaps are within a run, never from one to the next.
        gaps_s = [
            gap for _, rows in runs for gap in lane_gaps(r for r in rows if r.lane is lane)
        ] or [0.0]
        try:
            lines += _lane_lines(lane, fit_lane(steps, gaps_s))
        except ConfigError as error:
            raise ConfigError(f"{strategy}: {error}") from None
    return lines


def _lane_lines(lane: Lane, fitted: LaneFit) -> list[str]:
    lines = [
        "",
        "[[server.lane]]",
        f'lane = "{lane}"',
        f"step_s = {fitted.step_s:.4g}",
        f"delay_s = {fitted.delay_s:.4g}",
        f"spread_s = {fitted.spread_s:.4g}",
    ]
    for tokens, lost in zip(BESIDE_TOKENS, fitted.beside, strict=False):
        lines += ["", "[[server.lane.beside]]", f"tokens = {tokens}", f"lost = {lost:.4g}"]
    for layout, model in fitted.models.items():
        lines += ["", "[[server.lane.model]]", f'layout = "{layout}"']
        lines += [f"{key} = {value:.6g}" for key, value in model._asdict().items()]
        lines.append(
            f"# {fitted.num_alone[layout]} steps alone, median error {fitted.errors[layout]:.0%}"
        )
    return lines
