"""One live request: its sequence, its clock, and the queue its stream is fed from."""

import asyncio
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from csps.coordinator.sparse import SparseSummary
from csps.core.errors import CspsError
from csps.core.plan import Lane, Layout, SampledToken, ScoredTokens
from csps.core.request import FinishReason
from csps.rpc.interceptors import status_of
from csps.sched.sequence import Sequence

# A client's own clock ends a call at its deadline, before the server's would.
_DEADLINE_SLACK_S = 0.1


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Prompt tokens whose KV exists so far."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class Token:
    """A drawn token; `finish` says why it is the last one, if it is."""

    token: SampledToken
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class Ended:
    """No more tokens: aborted, or the server failed (`error`)."""

    finish: FinishReason
    error: CspsError | None = None


Event = Prefilled | Token | Ended


class PrefillStep(NamedTuple):
    """A step that computed prompt tokens of one request. `started`, `ended`: of time.time."""

    lane: Lane
    step_id: int
    layout: Layout
    num_tokens: int
    started: float
    ended: float


@dataclass(slots=True, eq=False)
class LiveRequest:
    """Fed by the engine loop, drained by the request's own stream.

    The queue needs no bound: it never holds more than the request's tokens.
    Times are of time.monotonic, 0 until they happen. `scores`: log-probabilities of prompt
    tokens by position, as ranks report them. `trace_context`: W3C headers that came with the
    request. `finish` or `error`: what its stream ended with, both None if the client left it.
    """

    request_id: str
    seq: Sequence
    received: float
    queued: float = field(default_factory=time.monotonic)
    deadline: float = math.inf
    first_scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    ended: float = 0.0
    finish: FinishReason | None = None
    error: CspsError | None = None
    trace_context: Mapping[str, str] = field(default_factory=dict)
    prefill_steps: list[PrefillStep] = field(default_factory=list)
    sparse: SparseSummary = field(default_factory=SparseSummary)
    scores: dict[int, float] = field(default_factory=dict)
    events: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)

    @property
    def status(self) -> str:
        """Name of the gRPC status that its stream ended with."""
        if self.finish is not None:
            return "OK"
        if self.error is not None:
            return status_of(self.error).name
        late = self.ended > self.deadline - _DEADLINE_SLACK_S
        return "DEADLINE_EXCEEDED" if late else "CANCELLED"

    def put_token(self, token: SampledToken, finish: FinishReason | None) -> float | None:
        """Seconds since the token before; None for the first."""
        before, self.last_token = self.last_token, time.monotonic()
        self.first_token = self.first_token or self.last_token
        self.events.put_nowait(Token(token, finish))
        return self.last_token - before if before else None

    def put_scores(self, scored: ScoredTokens) -> None:
        self.scores.update(enumerate(scored.logprobs, start=scored.start))

    def prompt_logprobs(self) -> list[float]:
        """Those the client asked for, in order of position; none before all are there."""
        if len(self.scores) != self.seq.sampling.prompt_logprobs:
            return []
        return [self.scores[position] for position in sorted(self.scores)]
