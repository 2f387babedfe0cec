"""Latency arithmetic shared by whoever reports it."""

from collections.abc import Sequence
from itertools import pairwise
from math import ceil


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile, share in (0, 1]; 0 of nothing."""
    ordered = sorted(values)
    return ordered[max(ceil(share * len(ordered)) - 1, 0)] if ordered else 0.0


def gaps_ms(arrivals: Sequence[float]) -> list[float]:
    """Milliseconds between consecutive arrivals, given in seconds (time between tokens)."""
    return [1e3 * (later - earlier) for earlier, later in pairwise(arrivals)]
