"""What a trace asks of a server."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, pstdev

from csps.percentiles import percentile
from csps.trace.schema import Trace, TraceRequest


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of tokens; percentiles by nearest rank."""

    mean: float
    p50: int
    p90: int
    p99: int
    max: int


@dataclass(frozen=True, slots=True)
class TraceStats:
    """`rate`: requests per second between the first and the last arrival; `interarrival_cv`:
    coefficient of variation of the time between arrivals. Both 0 if all arrive at once.
    `prefix_hit`: share of prompt tokens that a cache would have which keeps every prompt block
    (and no output) for ever.
    """

    name: str
    source: str
    block_tokens: int
    requests: int
    sessions: int
    turns_mean: float
    turns_max: int
    duration_s: float
    rate: float
    interarrival_cv: float
    prompt: Lengths
    output: Lengths
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    prefix_hit: float


def trace_stats(trace: Trace) -> TraceStats:
    requests = trace.requests
    gaps = [later.arrival_s - earlier.arrival_s for earlier, later in pairwise(requests)]
    mean_gap = fmean(gaps) if gaps else 0.0
    turns = Counter(request.session for request in requests)
    prompts = [request.prompt_tokens for request in requests]
    outputs = [request.output_tokens for request in requests]
    cached_tokens = sum(cached_by_request(requests, trace.block_tokens))
    return TraceStats(
        name=trace.name,
        source=trace.source,
        block_tokens=trace.block_tokens,
        requests=len(requests),
        sessions=len(turns),
        turns_mean=len(requests) / len(turns),
        turns_max=max(turns.values()),
        duration_s=sum(gaps),
        rate=1 / mean_gap if mean_gap else 0.0,
        interarrival_cv=pstdev(gaps) / mean_gap if mean_gap else 0.0,
        prompt=_lengths(prompts),
        output=_lengths(outputs),
        prompt_tokens=sum(prompts),
        output_tokens=sum(outputs),
        cached_tokens=cached_tokens,
        prefix_hit=cached_tokens / sum(prompts),
    )


def cached_by_request(requests: Iterable[TraceRequest], block_tokens: int) -> list[int]:
    """Tokens of each prompt in leading blocks that an earlier prompt had."""
    seen: set[int] = set()
    cached = []
    for request in requests:
        num_blocks = 0
        for block in request.blocks:
            if block not in seen:
                break
            num_blocks += 1
        cached.append(min(num_blocks * block_tokens, request.prompt_tokens))
        seen.update(request.blocks)
    return cached


def _lengths(tokens: Sequence[int]) -> Lengths:
    return Lengths(
        mean=fmean(tokens),
        p50=int(percentile(tokens, 0.50)),
        p90=int(percentile(tokens, 0.90)),
        p99=int(percentile(tokens, 0.99)),
        max=max(tokens),
    )
