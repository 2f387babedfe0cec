"""What a step costs: a linear model of its time, fitted to measured steps.

One model per layout. Bytes moved are a fixed number per token in a layout, and collectives a
fixed number per step, so their costs are in `per_token_s` and `fixed_s`. Matrix products of few
rows use a processor badly: the first tokens of a step cost more than later ones. `first_4_s` and
`first_64_s` let the time of tokens be piecewise linear, less and less steep.
"""

from collections.abc import Sequence
from operator import mul
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from csps.core.plan import StepPlan

Floats = npt.NDArray[np.float64]

# Coordinate descent on a few normalised columns: it ends when no coefficient moves any more.
_SWEEPS = 5000
_FITS = 4  # after three the predictions hardly change
_STILL = 1e-9


class StepShape(NamedTuple):
    """What the time of a step depends on.

    `num_tokens`: new tokens of all ranks. `num_sequences`: sequences that have some.
    `num_pairs`: (new token, key) pairs of all, which is what prefill computes.
    `num_keys`: keys that single new tokens meet, which is what decode reads.
    """

    num_tokens: int
    num_sequences: int
    num_pairs: int
    num_keys: int


def shape_of(plan: StepPlan) -> StepShape:
    """The shape of a planned step."""
    pairs = keys = 0
    tokens = 0
    for work in plan.work:
        num = len(work.token_ids)
        tokens += num
        if num == 1:
            keys += work.start + 1
        else:
            pairs += num * work.start + num * (num + 1) // 2
    return StepShape(tokens, len(plan.work), pairs, keys)


class Sample(NamedTuple):
    """A measured step; `seconds` of its slowest rank."""

    shape: StepShape
    seconds: float


class CostModel(NamedTuple):
    """Seconds of a step: fixed_s + per_token_s * num_tokens + ..., no term below 0.

    `first_n_s`: seconds of each of the first n tokens, besides per_token_s.
    """

    fixed_s: float
    per_token_s: float
    per_sequence_s: float
    per_pair_s: float
    per_key_s: float
    first_4_s: float = 0.0
    first_64_s: float = 0.0

    def predict(self, shape: StepShape) -> float:
        """Seconds that a step of this shape takes."""
        seconds: float = sum(map(mul, self, _counts(shape)))
        return seconds


def _counts(shape: StepShape) -> tuple[int, ...]:
    """What each coefficient of a CostModel is multiplied by."""
    return (1, *shape, min(shape.num_tokens, 4), min(shape.num_tokens, 64))


def fit(samples: Sequence[Sample]) -> CostModel:
    """`fit_with`, without extras."""
    model, _ = fit_with(samples, np.empty((len(samples), 0)))
    return model


def fit_with(samples: Sequence[Sample], extras: Floats) -> tuple[CostModel, list[float]]:
    """The model and the seconds per unit of each of `extras` [samples, E] that fit best.

    With the least sum of squared *relative* errors over `samples` (at least one).

    Relative to what the model predicts: relative to what was measured, slow samples of a noisy
    machine would count for less than fast ones, and predictions be too low on average. So the fit
    is repeated, each time relative to the last one's predictions (iteratively reweighted least
    squares); the first time to the measured seconds.

    Coefficients are bounded below by 0 (non-negative least squares), so that a model fitted to
    few steps does not predict negative times for others.
    """
    seconds = np.array([sample.seconds for sample in samples])
    shapes = np.array([_counts(sample.shape) for sample in samples], dtype=np.float64)
    counts = np.hstack((shapes, extras))
    unit = seconds
    solution = np.zeros(counts.shape[1])
    for _ in range(_FITS):
        solution = non_negative(counts / unit[:, None], seconds / unit, solution)
        # A sample far off from all others must not count for nothing, nor for everything.
        unit = np.clip(counts @ solution, seconds / 4, seconds * 4)
    split = shapes.shape[1]
    return CostModel(*solution[:split].tolist()), solution[split:].tolist()


def non_negative(matrix: Floats, target: Floats, start: Floats | None = None) -> Floats:
    """Minimise |matrix x - target| over x >= 0, by coordinate descent from `start` (default 0).

    A column of zeros has x = 0.
    """
    norms = np.linalg.norm(matrix, axis=0)
    norms[norms == 0.0] = 1.0
    columns = matrix / norms
    gram, right = columns.T @ columns, columns.T @ target
    solution = norms * (0.0 if start is None else start)
    for _ in range(_SWEEPS):
        before = solution.copy()
        for i in range(len(solution)):
            if gram[i, i]:
                step = (right[i] - gram[i] @ solution) / gram[i, i]
                solution[i] = max(solution[i] + step, 0.0)
        if np.abs(solution - before).max() <= _STILL * solution.max():
            break
    found: Floats = solution / norms
    return found
