"""Capacity: the highest rate of requests at which a service objective is met."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from csps.core.errors import ConfigError
from csps.percentiles import percentile
from csps.records.rows import RequestRow, Status

MAX_DOUBLINGS = 20


@dataclass(frozen=True, slots=True)
class Objective:
    """What a run must meet; None: not asked for.

    `tbt_ms`: P99 of all gaps between tokens, and with it a median queue time of at most
    `median_queue_s`: the rule of Sarathi-Serve (OSDI'24), section 5. `ttft_s`: of the share
    `ttft_share` of requests.
    """

    tbt_ms: float | None = None
    ttft_s: float | None = None
    ttft_share: float = 0.99
    median_queue_s: float = 2.0

    def met(self, requests: Sequence[RequestRow]) -> bool:
        """Whether all of it is. A request that failed or did not end misses it."""
        if not requests or any(row.status is not Status.DONE for row in requests):
            return False
        if self.tbt_ms is not None:
            gaps_ms = [gap for row in requests for gap in row.gaps_ms]
            if percentile(gaps_ms, 0.99) > self.tbt_ms:
                return False
            if percentile([row.queue_s or 0.0 for row in requests], 0.5) > self.median_queue_s:
                return False
        if self.ttft_s is None:
            return True
        return percentile([row.ttft_s or 0.0 for row in requests], self.ttft_share) <= self.ttft_s


@dataclass(frozen=True, slots=True)
class Capacity:
    """`highest`: the highest rate tried that meets the objective, 0 if none; `lowest_missed`: the
    lowest that does not, None if none. `tried`: (rate, met) in order.
    """

    highest: float
    lowest_missed: float | None
    tried: tuple[tuple[float, bool], ...]


def objective_of(slo_tbt_ms: float | None, slo_ttft_s: float | None) -> Objective:
    """What --slo-tbt and --slo-ttft ask for; ConfigError if neither was given."""
    if slo_tbt_ms is None and slo_ttft_s is None:
        raise ConfigError("--find-capacity: give what must be met: --slo-tbt, --slo-ttft or both")
    return Objective(tbt_ms=slo_tbt_ms, ttft_s=slo_ttft_s)


def rate_of(arrivals_s: Sequence[float]) -> float:
    """Requests per second of a trace at speed 1; ConfigError if all arrive at once."""
    span_s = max(arrivals_s) - min(arrivals_s)
    if not span_s:
        raise ConfigError("--find-capacity: all requests of the trace arrive at once")
    return len(arrivals_s) / span_s


def capacity_record(found: Capacity, objective: Objective, rate: float) -> dict[str, Any]:
    """What a search over speeds found, as it is written. `rate`: see rate_of."""
    return {
        "requests_per_s": found.highest * rate,
        "speed": found.highest,
        "slo_tbt_ms": objective.tbt_ms,
        "slo_ttft_s": objective.ttft_s,
        "median_queue_s": objective.median_queue_s,
        "tried": [
            {"requests_per_s": speed * rate, "speed": speed, "met": met}
            for speed, met in found.tried
        ],
    }


def check_found(found: Capacity, rate: float) -> None:
    """ConfigError if the lowest speed misses the objective."""
    if not found.highest:
        lowest = found.tried[0][0] * rate
        raise ConfigError(
            f"--find-capacity: missed even at {lowest:.3g} requests/s: give a lower --speed to "
            "start from"
        )


def find_capacity(
    meets: Callable[[float], bool], low: float, high: float, tolerance: float = 0.05
) -> Capacity:
    """Bisection for the highest rate that `meets` the objective, to a relative `tolerance`.

    Taken for granted: who meets it at a rate meets it at lower ones. `high` is doubled while it
    is met; if `low` is not met the answer is 0.
    """
    assert 0 < low < high, (low, high)
    tried: list[tuple[float, bool]] = []

    def is_met(rate: float) -> bool:
        tried.append((rate, meets(rate)))
        return tried[-1][1]

    if not is_met(low):
        return Capacity(0.0, low, tuple(tried))
    for _ in range(MAX_DOUBLINGS):
        if not is_met(high):
            break
        low, high = high, 2 * high
    else:
        return Capacity(low, None, tuple(tried))
    while high - low > tolerance * low:
        middle = (low + high) / 2
        if is_met(middle):
            low = middle
        else:
            high = middle
    return Capacity(low, high, tuple(tried))
