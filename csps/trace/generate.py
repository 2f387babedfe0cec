"""Traces drawn from a profile."""

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count, islice
from random import Random
from typing import NamedTuple

from csps.core.errors import ConfigError
from csps.trace.arrivals import ArrivalKind, Arrivals, arrival_times
from csps.trace.profiles import PROFILES, Profile, ProfileName, Turn
from csps.trace.schema import Trace, TraceRequest

BLOCK_TOKENS = 512


class _Next(NamedTuple):
    """A turn that is still to arrive; ordered by time, then by session."""

    arrival_s: float
    session: int
    turn: int
    turns: tuple[Turn, ...]


class _Blocks:
    """Ids: those of the system prompt first, new ones in order of arrival."""

    def __init__(self, system_tokens: int) -> None:
        self._system = tuple(range(system_tokens // BLOCK_TOKENS))
        self._ids = count(len(self._system))
        self._latest: dict[int, tuple[int, ...]] = {}  # by session, of its turn before

    def of(self, session: int, turn: Turn) -> tuple[int, ...]:
        before = self._latest.get(session, self._system)
        # Blocks that are only partly in common are different blocks.
        shared = before[: turn.shared_tokens // BLOCK_TOKENS]
        num_new = -(-turn.prompt_tokens // BLOCK_TOKENS) - len(shared)
        self._latest[session] = shared + tuple(islice(self._ids, num_new))
        return self._latest[session]


def generate(
    profile_name: ProfileName,
    seed: int = 0,
    rate: float | None = None,
    arrivals: Arrivals | None = None,
    requests: int | None = None,
    duration_s: float | None = None,
) -> Trace:
    """A trace that ends after `requests` or at `duration_s`, whichever is first (one is needed).

    `rate` is of requests per second in the long run, `arrivals` how sessions arrive: both default
    to the profile's. A trace begins without running sessions, so its rate rises towards `rate`
    over the first follow-ups. The same arguments give the same trace.
    """
    if requests is None and duration_s is None:
        raise ConfigError("--requests or --duration: say where the trace ends")
    profile = PROFILES[profile_name]
    rate = profile.rate if rate is None else rate
    arrivals = arrivals or profile.arrivals
    _check(rate, arrivals, requests)
    rows: list[TraceRequest] = []
    blocks = _Blocks(profile.system_tokens)
    for due in _turns(profile, rate, arrivals, Random(seed)):
        if len(rows) == requests or (duration_s is not None and due.arrival_s > duration_s):
            break
        turn = due.turns[due.turn]
        rows.append(
            TraceRequest(
                arrival_s=round(due.arrival_s, 6),
                prompt_tokens=turn.prompt_tokens,
                output_tokens=turn.output_tokens,
                blocks=blocks.of(due.session, turn),
                session=due.session,
                turn=due.turn + 1,
            )
        )
    if not rows:
        raise ConfigError(f"--duration: nothing arrives within {duration_s} s")
    source = _source(profile_name, seed, rate, arrivals, requests, duration_s)
    return Trace(profile_name, source, BLOCK_TOKENS, tuple(rows))


def _turns(profile: Profile, rate: float, arrivals: Arrivals, rng: Random) -> Iterator[_Next]:
    """Turns of all sessions in order of arrival, without end."""
    pending: list[_Next] = []
    for session, start in enumerate(arrival_times(arrivals, rate / profile.turns, rng)):
        while pending and pending[0].arrival_s <= start:
            due = heappop(pending)
            yield due
            _push(pending, due)
        turns = tuple(profile.sessions.draw(rng))
        heappush(pending, _Next(start, session, 0, turns))


def _push(pending: list[_Next], due: _Next) -> None:
    """The turn after `due`, if there is one."""
    if due.turn + 1 < len(due.turns):
        start = due.arrival_s - due.turns[due.turn].offset_s
        later = start + due.turns[due.turn + 1].offset_s
        heappush(pending, _Next(later, due.session, due.turn + 1, due.turns))


def _check(rate: float, arrivals: Arrivals, requests: int | None) -> None:
    if requests is not None and requests < 1:
        raise ConfigError(f"--requests: expected at least 1, got {requests}")
    for flag, value in (
        ("--rate", rate),
        ("--cv", arrivals.cv),
        ("--on", arrivals.on_s),
        ("--off", arrivals.off_s),
    ):
        if not 0 < value < float("inf"):
            raise ConfigError(f"{flag}: expected a number above 0, got {value}")


def _source(
    profile_name: ProfileName,
    seed: int,
    rate: float,
    arrivals: Arrivals,
    requests: int | None,
    duration_s: float | None,
) -> str:
    """The command that makes the trace again."""
    words = [f"csps trace generate {profile_name} --seed {seed} --rate {rate:g}"]
    words.append(f"--arrivals {arrivals.kind}")
    if arrivals.kind is ArrivalKind.GAMMA:
        words.append(f"--cv {arrivals.cv:g}")
    if arrivals.kind is ArrivalKind.ON_OFF:
        words.append(f"--on {arrivals.on_s:g} --off {arrivals.off_s:g}")
    if requests is not None:
        words.append(f"--requests {requests}")
    if duration_s is not None:
        words.append(f"--duration {duration_s:g}")
    return " ".join(words)
