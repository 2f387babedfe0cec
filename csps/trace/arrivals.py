"""When requests arrive: Poisson, gamma renewal, on/off. Endless, seeded by the caller's rng."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from random import Random


class ArrivalKind(StrEnum):
    POISSON = "poisson"
    GAMMA = "gamma"
    ON_OFF = "on-off"


@dataclass(frozen=True, slots=True)
class Arrivals:
    """`cv` (gamma): coefficient of variation of the time between arrivals; 1 is Poisson.
    `on_s`, `off_s` (on-off): mean lengths of bursts and of the silence between, both exponential.
    """

    kind: ArrivalKind = ArrivalKind.POISSON
    cv: float = 3.2
    on_s: float = 17.0  # these two: as in the Azure code trace of 2023
    off_s: float = 43.0


def arrival_times(arrivals: Arrivals, rate: float, rng: Random) -> Iterator[float]:
    """Seconds since the start, rising, on average `rate` in a second (above 0)."""
    match arrivals.kind:
        case ArrivalKind.POISSON:
            return _poisson(rate, rng)
        case ArrivalKind.GAMMA:
            return _gamma(rate, arrivals.cv, rng)
        case ArrivalKind.ON_OFF:
            return _on_off(rate, arrivals.on_s, arrivals.off_s, rng)


def _poisson(rate: float, rng: Random) -> Iterator[float]:
    now = 0.0
    while True:
        now += rng.expovariate(rate)
        yield now


def _gamma(rate: float, cv: float, rng: Random) -> Iterator[float]:
    shape = cv**-2  # a gamma's CV is 1 / sqrt(shape)
    now = 0.0
    while True:
        now += rng.gammavariate(shape, 1 / (rate * shape))
        yield now


def _on_off(rate: float, on_s: float, off_s: float, rng: Random) -> Iterator[float]:
    burst_rate = rate * (on_s + off_s) / on_s
    start = 0.0
    while True:
        end = start + rng.expovariate(1 / on_s)
        now = start + rng.expovariate(burst_rate)
        while now < end:
            yield now
            now += rng.expovariate(burst_rate)
        start = end + rng.expovariate(1 / off_s)
