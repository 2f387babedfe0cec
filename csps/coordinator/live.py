"""One live request: its sequence, its clock, and the queue its stream is fed from."""

import asyncio
import time
from dataclasses import dataclass, field

from csps.coordinator.sparse import SparseSummary
from csps.core.errors import CspsError
from csps.core.plan import SampledToken, ScoredTokens
from csps.core.request import FinishReason
from csps.sched.sequence import Sequence


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


@dataclass(slots=True, eq=False)
class LiveRequest:
    """Fed by the engine loop, drained by the request's own stream.

    The queue needs no bound: it never holds more than the request's tokens.
    Times are of time.monotonic, 0 until they happen. `scores`: log-probabilities of prompt
    tokens by position, as ranks report them.
    """

    request_id: str
    seq: Sequence
    received: float
    queued: float = field(default_factory=time.monotonic)
    first_scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    sparse: SparseSummary = field(default_factory=SparseSummary)
    scores: dict[int, float] = field(default_factory=dict)
    events: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)

    def put_token(self, token: SampledToken, finish: FinishReason | None) -> None:
        self.last_token = time.monotonic()
        self.first_token = self.first_token or self.last_token
        self.events.put_nowait(Token(token, finish))

    def put_scores(self, scored: ScoredTokens) -> None:
        self.scores.update(enumerate(scored.logprobs, start=scored.start))

    def prompt_logprobs(self) -> list[float]:
        """Those the client asked for, in order of position; none before all are there."""
        if len(self.scores) != self.seq.sampling.prompt_logprobs:
            return []
        return [self.scores[position] for position in sorted(self.scores)]
