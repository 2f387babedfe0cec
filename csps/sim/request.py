"""One request of a simulated run: its sequence, and what its client would have seen."""

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from csps.core.attention import AttentionParams
from csps.core.request import SamplingParams
from csps.records.rows import RequestRow, Status
from csps.sched.sequence import Sequence
from csps.sim.density import DensityTable
from csps.trace.schema import TraceRequest


def prompt_ids(blocks: Seq[int], block_tokens: int, num_tokens: int) -> "array[int]":
    """A prompt whose block b is the token b, over and over.

    Prompts share exactly what their leading ids have in common: KV blocks are found by all tokens
    up to their end.
    """
    tokens = np.repeat(np.array(blocks, dtype=np.uint32), block_tokens)[:num_tokens]
    return array("I", tokens.tobytes())


@dataclass(slots=True, eq=False)
class SimRequest:
    """A request that was sent at `sent_s`. Times in seconds since the run began."""

    index: int
    trace: TraceRequest
    sent_s: float
    sequence: Sequence
    scheduled_s: float | None = None
    first_s: float | None = None
    last_s: float = 0.0
    num_output: int = 0
    gaps_ms: "array[float]" = field(default_factory=lambda: array("d"))

    def note_scheduled(self, now: float) -> None:
        if self.scheduled_s is None:
            self.scheduled_s = now

    def note_token(self, now: float) -> None:
        if self.first_s is None:
            self.first_s = now
        else:
            self.gaps_ms.append(1e3 * (now - self.last_s))
        self.last_s = now
        self.num_output += 1

    def row(self, status: Status, ended_s: float, density: DensityTable) -> RequestRow:
        """What the record says of it. `density`: of prompts that are prefilled sparsely."""
        trace, sent_s = self.trace, self.sent_s
        kept = None
        if self.sequence.attention.is_sparse and self.first_s is not None:
            kept = density.at(trace.prompt_tokens)
        return RequestRow(
            request_id=str(self.index),
            arrival_s=sent_s,
            sent_s=sent_s,
            prompt_tokens=trace.prompt_tokens,
            wanted_tokens=trace.output_tokens,
            output_tokens=self.num_output,
            status=status,
            response_s=ended_s - sent_s,
            queue_s=None if self.scheduled_s is None else self.scheduled_s - sent_s,
            ttft_s=None if self.first_s is None else self.first_s - sent_s,
            gaps_ms=tuple(self.gaps_ms),
            cached_tokens=self.sequence.num_cached or 0,
            session=trace.session,
            turn=trace.turn,
            density=kept and kept.density,
            union_density=kept and kept.union_density,
            recall_mean=kept and kept.recall,
        )


def make_request(
    index: int,
    trace: TraceRequest,
    block_tokens: int,
    sent_s: float,
    attention: AttentionParams,
) -> SimRequest:
    """A request as a client would send it, that stops at the trace's output length."""
    ids = prompt_ids(trace.blocks, block_tokens, trace.prompt_tokens)
    sampling = SamplingParams(max_tokens=trace.output_tokens, ignore_eos=True)
    return SimRequest(index, trace, sent_s, Sequence(index, ids, sampling, attention=attention))
