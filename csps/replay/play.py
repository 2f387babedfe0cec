"""Sends the requests of a trace, open loop: none waits for another's answer, as users do not."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from csps.core.errors import CspsError
from csps.core.request import SamplingParams
from csps.percentiles import gaps_ms
from csps.records.rows import RequestRow, Status
from csps.rpc.client import (
    SERVERS_CHOICE,
    AttentionChoice,
    Chunk,
    Complete,
    GenerationClient,
    Progress,
)
from csps.trace.schema import TraceRequest


@dataclass(slots=True)
class Live:
    """A request on its way; times of time.monotonic, 0 where that has not been reached."""

    index: int
    request: TraceRequest
    sent: float
    scheduled: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    complete: Complete | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return self.arrivals[0] - self.sent if self.arrivals else None

    def row(self, begun: float, speed: float, now: float) -> RequestRow:
        """Its record, also before it has ended."""
        complete, request = self.complete, self.request
        sparse = complete.sparse if complete else None
        queue_s = self.scheduled - self.sent if self.scheduled else None
        if complete is not None:  # the server's own clock knows better than its messages
            queue_s = complete.first_scheduled_s
        status = Status.FAILED if self.error else Status.DONE if complete else Status.UNFINISHED
        return RequestRow(
            request_id=str(self.index),
            arrival_s=request.arrival_s / speed,
            sent_s=self.sent - begun,
            prompt_tokens=request.prompt_tokens,
            wanted_tokens=request.output_tokens,
            output_tokens=len(self.arrivals),
            status=status,
            response_s=(self.ended or now) - self.sent,
            queue_s=queue_s,
            ttft_s=self.ttft_s,
            gaps_ms=tuple(gaps_ms(self.arrivals)),
            cached_tokens=complete.cached_tokens if complete else 0,
            session=request.session,
            turn=request.turn,
            error=self.error,
            density=sparse.density if sparse else None,
            union_density=sparse.union_density if sparse else None,
            recall_mean=sparse.recall_mean if sparse else None,
            recall_min=sparse.recall_min if sparse else None,
        )


@dataclass(slots=True)
class Player:
    """Plays `requests` to a server, `speed` times as fast as their arrivals say.

    `prompt` makes a request's tokens; `on_end` gets each row as soon as it is known.
    """

    client: GenerationClient
    requests: Sequence[TraceRequest]
    prompt: Callable[[TraceRequest], list[int]]
    on_end: Callable[[RequestRow], None]
    speed: float = 1.0
    attention: AttentionChoice = SERVERS_CHOICE
    run_id: str = "replay"
    begun: float = 0.0
    live: dict[int, Live] = field(default_factory=dict)
    num_sent: int = 0
    num_done: int = 0
    num_failed: int = 0
    late_s: float = 0.0  # how far sending fell behind the trace's clock at most
    ttfts_s: list[float] = field(default_factory=list)

    async def run(self, drain_s: float | None) -> None:
        """Send all and wait for their ends, `drain_s` after the last at most (None: for ever).

        What has not ended then, or when this is cancelled, is cancelled at the server; its rows
        say unfinished.
        """
        self.begun = time.monotonic()
        tasks: set[asyncio.Task[None]] = set()
        try:
            for index, request in enumerate(self.requests):
                # Built before its time has come, in a thread: sending must not be late for it.
                token_ids = await asyncio.to_thread(self.prompt, request)
                due = self.begun + request.arrival_s / self.speed
                await asyncio.sleep(max(due - time.monotonic(), 0.0))
                live = Live(index, request, time.monotonic())
                self.late_s = max(self.late_s, live.sent - due)
                self.num_sent += 1
                self.live[index] = live
                task = asyncio.create_task(self._follow(live, token_ids))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            if tasks:
                await asyncio.wait(tasks, timeout=drain_s)
        finally:
            now = time.monotonic()
            for live in self.live.values():
                self.on_end(live.row(self.begun, self.speed, now))
            self.live.clear()
            left = list(tasks)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _follow(self, live: Live, token_ids: list[int]) -> None:
        request = live.request
        sampling = SamplingParams(max_tokens=request.output_tokens, ignore_eos=True)
        events = self.client.generate(
            token_ids,
            sampling,
            attention=self.attention,
            request_id=f"{self.run_id}-{live.index}",
        )
        try:
            async with aclosing(events):  # type: ignore[type-var]
                async for event in events:
                    self._take(live, event)
        except CspsError as error:
            live.error = str(error)
        live.ended = time.monotonic()
        if self.live.pop(live.index, None) is None:  # counted as unfinished already
            return
        self.num_failed += live.error is not None
        self.num_done += live.error is None
        self.on_end(live.row(self.begun, self.speed, live.ended))

    def _take(self, live: Live, event: Chunk | Complete | Progress) -> None:
        now = time.monotonic()
        if isinstance(event, Chunk):
            if not live.arrivals:
                self.ttfts_s.append(now - live.sent)
            live.arrivals += [now] * len(event.token_ids)
        elif isinstance(event, Complete):
            live.complete = event
        elif not event.queued and not live.scheduled:
            live.scheduled = now


def too_long(requests: Sequence[TraceRequest], max_model_len: int) -> Iterator[tuple[int, int]]:
    """Index and tokens of the requests that no server with this context can run."""
    for index, request in enumerate(requests):
        num_tokens = request.prompt_tokens + request.output_tokens
        if num_tokens > max_model_len:
            yield index, num_tokens
