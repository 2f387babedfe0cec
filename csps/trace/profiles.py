"""Profiles: what sessions of long-prompt workloads look like, fitted to published traces.

Sources, and how well each profile fits: traces/README.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import log
from random import Random
from types import MappingProxyType
from typing import NamedTuple, Protocol

from csps.trace.arrivals import ArrivalKind, Arrivals


class ProfileName(StrEnum):
    CHAT_LONG = "chat_long"
    DOC_QA = "doc_qa"
    API_HEAVY_TAIL = "api_heavy_tail"
    REASON_LONG = "reason_long"


class Lognormal(NamedTuple):
    weight: float
    median: float
    sigma: float


@dataclass(frozen=True, slots=True)
class Mixture:
    """Numbers of tokens: a mixture of lognormals, rounded, in [1, cap]."""

    parts: tuple[Lognormal, ...]
    cap: int

    def draw(self, rng: Random) -> int:
        [part] = rng.choices(self.parts, [part.weight for part in self.parts])
        return max(1, min(self.cap, round(rng.lognormvariate(log(part.median), part.sigma))))


class Turn(NamedTuple):
    """`shared_tokens`: leading tokens in common with the turn before; of a session's first turn,
    with every session. `offset_s`: seconds since the session began."""

    offset_s: float
    prompt_tokens: int
    output_tokens: int
    shared_tokens: int


class Sessions(Protocol):
    """How the sessions of a profile are drawn."""

    def draw(self, rng: Random) -> Iterator[Turn]: ...


@dataclass(frozen=True, slots=True)
class Chat:
    """Conversations: each turn's prompt is all that was said before, and something new."""

    system_tokens: int
    extra: Mixture  # of the first prompt, behind the system prompt
    growth: Mixture  # from one answer to the next prompt's end
    output: Mixture
    cap: int
    again: tuple[float, ...]  # probability of one more after turn 1, 2, ...; the last from there on
    again_least: int  # prompts below it are not followed up
    branch: float  # share of follow-ups that keep only a part of the prompt before
    gap: Lognormal  # seconds between turns

    def draw(self, rng: Random) -> Iterator[Turn]:
        offset_s, turn = 0.0, 0
        prompt, shared = self.system_tokens + self.extra.draw(rng), self.system_tokens
        while prompt <= self.cap or turn == 0:
            prompt = min(prompt, self.cap)
            output = self.output.draw(rng)
            yield Turn(offset_s, prompt, output, shared)
            again = self.again[min(turn, len(self.again) - 1)]
            if prompt < self.again_least or rng.random() >= again:
                return
            edited = rng.random() < self.branch  # somewhere behind the system prompt
            shared = rng.randint(self.system_tokens, prompt) if edited else prompt
            prompt += output + self.growth.draw(rng)
            offset_s += rng.lognormvariate(log(self.gap.median), self.gap.sigma)
            turn += 1


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents with one question, or with several, each asked of the document alone."""

    one_share: float  # of the documents
    one: Mixture
    one_output: Mixture
    several: Mixture
    several_output: Mixture
    questions: float  # mean number of several, which are at least 2
    gap_s: float  # mean seconds between questions
    question: Lognormal  # tokens at the prompt's end that are the question's own

    def draw(self, rng: Random) -> Iterator[Turn]:
        if rng.random() < self.one_share:
            yield Turn(0.0, self.one.draw(rng), self.one_output.draw(rng), 0)
            return
        prompt = self.several.draw(rng)
        yield Turn(0.0, prompt, self.several_output.draw(rng), 0)
        offset_s, asked = 0.0, 1
        # One more for certain, then one more each time with the same probability.
        while asked < 2 or rng.random() < 1 - 1 / (self.questions - 1):
            offset_s += rng.expovariate(1 / self.gap_s)
            own = round(rng.lognormvariate(log(self.question.median), self.question.sigma))
            yield Turn(offset_s, prompt, self.several_output.draw(rng), max(prompt - own, 0))
            asked += 1


@dataclass(frozen=True, slots=True)
class Single:
    """Requests that share nothing."""

    prompt: Mixture
    output: Mixture

    def draw(self, rng: Random) -> Iterator[Turn]:
        yield Turn(0.0, self.prompt.draw(rng), self.output.draw(rng), 0)


POISSON = Arrivals(ArrivalKind.POISSON)


@dataclass(frozen=True, slots=True)
class Profile:
    """`rate`: requests per second of the trace it is fitted to. `turns`: mean of a session."""

    sessions: Sessions
    rate: float
    turns: float = 1.0
    arrivals: Arrivals = POISSON  # of sessions
    system_tokens: int = 0  # that all sessions begin with


def _mixture(*parts: tuple[float, float, float], cap: int) -> Mixture:
    return Mixture(tuple(Lognormal(*part) for part in parts), cap)


PROFILES: Mapping[ProfileName, Profile] = MappingProxyType(
    {
        ProfileName.CHAT_LONG: Profile(
            Chat(
                system_tokens=885,
                extra=_mixture(
                    (0.115, 14, 0.38), (0.222, 295, 1.41), (0.662, 8889, 0.99), cap=126_195
                ),
                growth=_mixture(
                    (0.421, 13, 0.59), (0.404, 116, 1.69), (0.175, 5331, 0.67), cap=126_195
                ),
                output=_mixture(
                    (0.248, 33, 1.51), (0.312, 320, 0.63), (0.439, 431, 0.26), cap=2000
                ),
                cap=126_195,
                again=(0.40, 0.46, 0.52, 0.60),
                again_least=1024,
                branch=0.15,
                gap=Lognormal(1, 131, 0.98),
            ),
            rate=3.40,
            turns=1.67,
            system_tokens=885,
        ),
        ProfileName.DOC_QA: Profile(
            Documents(
                one_share=0.60,
                one=_mixture((1, 17_139, 0.33), cap=191_378),
                one_output=_mixture((0.12, 31, 1.49), (0.88, 251, 0.36), cap=2000),
                several=_mixture((1, 24_000, 0.60), cap=191_378),
                several_output=_mixture((0.515, 5, 0.71), (0.485, 54, 1.02), cap=2000),
                questions=5.35,
                gap_s=118,
                question=Lognormal(1, 100, 1.0),
            ),
            rate=2.35,
            turns=2.74,
        ),
        ProfileName.API_HEAVY_TAIL: Profile(
            Single(
                prompt=_mixture((0.63, 1811, 1.06), (0.37, 21_970, 0.63), cap=125_476),
                # The 5% that the fit leaves over are answers of one token.
                output=_mixture((0.95, 118, 1.49), (0.05, 1, 0), cap=8192),
            ),
            rate=0.12,
            arrivals=Arrivals(ArrivalKind.GAMMA, cv=3.2),
        ),
        ProfileName.REASON_LONG: Profile(
            Single(
                prompt=_mixture((0.55, 11_744, 0.42), (0.45, 19_273, 0.27), cap=48_394),
                output=_mixture((0.54, 983, 0.21), (0.46, 1575, 0.41), cap=4096),
            ),
            rate=0.39,
        ),
    }
)
