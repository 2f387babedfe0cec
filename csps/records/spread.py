"""Mean and percentiles of many values, some of which are only known to be at least so much."""

from collections.abc import Iterable
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
FloatsLike = Floats | Iterable[float]
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def floats(values: FloatsLike) -> Floats:
    if isinstance(values, np.ndarray):
        return values
    return np.fromiter(values, dtype=np.float64)


def nearest_rank(ordered: Floats, share: float) -> float:
    """csps.percentiles.percentile of values in ascending order, without sorting them again."""
    return float(ordered[max(ceil(share * len(ordered)) - 1, 0)]) if len(ordered) else 0.0


def spread(exact: FloatsLike, bounds: FloatsLike = ()) -> dict[str, Any]:
    """count, mean, p50, p90, p99 and max of `exact` and `bounds` together; None of nothing.

    `bounds` are values that would have come out larger. `lower_bounds` says how many there are,
    `at_least` which of the figures would have been larger too, for all that is known: a
    percentile is exact if all bounds lie above it.
    """
    known, least = floats(exact), floats(bounds)
    values = np.sort(np.concatenate((known, least)))
    if not len(values):
        return {"count": 0, **dict.fromkeys(("mean", *SHARES, "max")), "lower_bounds": 0,
                "at_least": []}  # fmt: skip
    figures = {
        "mean": float(values.mean()),
        **{name: nearest_rank(values, share) for name, share in SHARES.items()},
        "max": float(values[-1]),
    }
    first = float(least.min()) if len(least) else float("inf")
    at_least = [name for name, value in figures.items() if len(least) and value >= first]
    if len(least) and "mean" not in at_least:
        at_least = ["mean", *at_least]
    return {"count": len(values), **figures, "lower_bounds": len(least), "at_least": at_least}
