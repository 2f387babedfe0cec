"""What a run's records say: latencies, throughput, goodput, failures, and sums over its steps."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from csps.core.errors import ConfigError
from csps.percentiles import percentile
from csps.records.rows import (
    SUMMARY_FILE,
    RequestRow,
    Status,
    StepRow,
    iter_steps,
    read_requests,
)
from csps.records.run import RunInfo, read_run
from csps.records.spread import spread
from csps.records.steps import StepDigest

NOTES = {
    "latency": (
        "From when a request was sent. Percentiles are nearest-rank. TBT is of all gaps between "
        "the tokens of all requests; worst_gap_ms the longest gap of each request; normalized_s "
        "response time per output token; queue_s the time until a request's first step."
    ),
    "lower_bounds": (
        "Requests that had not ended when the run did are in the figures with the time they had "
        "waited by then, as queue time (without a first step), TTFT (without a first token), last "
        "gap, response time, and response time per token they were to have: lower bounds, counted "
        "in lower_bounds; at_least names the figures that would have been larger without the end. "
        "Failed requests are in no latency figure."
    ),
    "throughput": (
        "Tokens per second from the first request sent to the last one ended: prompt tokens of "
        "requests with a first token (uncached: without those from the prefix cache), and output "
        "tokens. A lane's tokens_per_busy_s counts only the time in which it had a step, per "
        "replica."
    ),
    "goodput": (
        "Requests per second that ended well, with TTFT within the objective and the p99 of their "
        "own gaps within the other. Of all requests sent: failed and unfinished ones missed it. "
        "An objective of each request, as DistServe's; the tail of its gaps rather than their "
        "mean, as Sarathi-Serve's objective on TBT, because a mean hides stalls."
    ),
    "steps": (
        "Seconds are summed over ranks: compute + exposed communication = wall. Bytes against "
        "dense: sent, over what exact attention would have sent in the same steps. Density is the "
        "share of (query, key) pairs that was computed, recall the share of attention mass these "
        "had, in steps with sparse prefill. prediction_error is of predicted / measured - 1."
    ),
}


def write_summary(folder: Path) -> dict[str, Any]:
    """Summarize the run in `folder` into its summary.json. ConfigError as the readers."""
    summary = summarize(read_run(folder), read_requests(folder), iter_steps(folder))
    save(folder / SUMMARY_FILE, summary)
    return summary


def save(path: Path, value: object) -> None:
    """As JSON; ConfigError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def summarize(
    run: RunInfo, requests: Sequence[RequestRow], steps: Iterable[StepRow] = ()
) -> dict[str, Any]:
    """The content of summary.json; `notes` in it say how to read it.

    Seconds, milliseconds and bytes as the names say; None where there is nothing to count.
    """
    return summarize_digest(run, requests, StepDigest(run).take(steps))


def summarize_digest(
    run: RunInfo, requests: Sequence[RequestRow], steps: StepDigest
) -> dict[str, Any]:
    """`summarize` of steps that were taken already."""
    by_status = Counter(row.status for row in requests)
    makespan_s = _makespan_s(requests)
    failures = Counter(row.error or "no reason given" for row in requests if _failed(row))
    return {
        "name": run.name,
        "kind": run.kind.value,
        "strategy": run.strategy,
        "requests": {
            "count": len(requests),
            **{status.value: by_status[status] for status in Status},
        },
        "failures": dict(failures.most_common()),
        "makespan_s": makespan_s,
        "request_rate": request_rate(requests),
        "late_s_max": max((row.sent_s - row.arrival_s for row in requests), default=None),
        "latency": _latency(requests),
        "ttft_by_prompt": _by_prompt(requests),
        "throughput": _throughput(requests, makespan_s),
        "slo": _slo(run, requests, makespan_s),
        "cache": _cache(requests),
        "steps": steps.summary(),
        "notes": NOTES,
    }


def request_rate(requests: Sequence[RequestRow]) -> float | None:
    """Requests per second that the trace asked for; None of fewer than two."""
    arrivals = [row.arrival_s for row in requests]
    span_s = max(arrivals) - min(arrivals) if arrivals else 0.0
    return (len(arrivals) - 1) / span_s if span_s > 0 else None


def bucket(prompt_tokens: int) -> int:
    """The power of two at or below."""
    return 1 << max(prompt_tokens.bit_length() - 1, 0)


def _makespan_s(requests: Sequence[RequestRow]) -> float:
    if not requests:
        return 0.0
    ended_s = max(row.sent_s + row.response_s for row in requests)
    return ended_s - min(row.sent_s for row in requests)


def _failed(row: RequestRow) -> bool:
    return row.status is Status.FAILED


def _open(row: RequestRow) -> bool:
    return row.status is Status.UNFINISHED


def open_gap_ms(row: RequestRow) -> float | None:
    """How long an unfinished request had waited for its next token; None without a first."""
    if not _open(row) or row.ttft_s is None:
        return None
    return max(1e3 * (row.response_s - row.ttft_s) - sum(row.gaps_ms), 0.0)


def _latency(requests: Sequence[RequestRow]) -> dict[str, Any]:
    timed = [row for row in requests if not _failed(row)]
    done = [row for row in timed if not _open(row)]
    left = [row for row in timed if _open(row)]
    waiting = [(row, gap) for row in left if (gap := open_gap_ms(row)) is not None]
    return {
        "ttft_s": ttft_spread(timed),
        "tbt_ms": spread(
            chain.from_iterable(row.gaps_ms for row in timed), (gap for _, gap in waiting)
        ),
        "worst_gap_ms": spread(
            (max(row.gaps_ms) for row in done if row.gaps_ms),
            (max((*row.gaps_ms, gap)) for row, gap in waiting),
        ),
        "response_s": spread((row.response_s for row in done), (row.response_s for row in left)),
        "normalized_s": spread(
            (row.response_s / row.output_tokens for row in done if row.output_tokens),
            (row.response_s / row.wanted_tokens for row in left if row.wanted_tokens),
        ),
        "queue_s": spread(
            (row.queue_s for row in timed if row.queue_s is not None),
            (row.response_s for row in left if row.queue_s is None and row.ttft_s is None),
        ),
    }


def ttft_spread(timed: Sequence[RequestRow]) -> dict[str, Any]:
    """Of requests that did not fail."""
    return spread(
        (row.ttft_s for row in timed if row.ttft_s is not None),
        (row.response_s for row in timed if row.ttft_s is None and _open(row)),
    )


def _by_prompt(requests: Sequence[RequestRow]) -> list[dict[str, Any]]:
    """TTFT by length of the prompt, `from_tokens` up to twice that."""
    buckets: dict[int, list[RequestRow]] = defaultdict(list)
    for row in requests:
        if not _failed(row):
            buckets[bucket(row.prompt_tokens)].append(row)
    return [
        {"from_tokens": first, "below_tokens": 2 * first, **ttft_spread(buckets[first])}
        for first in sorted(buckets)
    ]


def _throughput(requests: Sequence[RequestRow], makespan_s: float) -> dict[str, float | None]:
    begun = [row for row in requests if row.ttft_s is not None]
    prompt = sum(row.prompt_tokens for row in begun)
    totals = {
        "prefill_tok_s": prompt,
        "prefill_uncached_tok_s": prompt - sum(row.cached_tokens for row in begun),
        "decode_tok_s": sum(row.output_tokens for row in requests),
        "done_req_s": sum(row.status is Status.DONE for row in requests),
    }
    return {name: total / makespan_s if makespan_s else None for name, total in totals.items()}


def _slo(run: RunInfo, requests: Sequence[RequestRow], makespan_s: float) -> dict[str, Any]:
    """Shares are of all requests; None where there is no such objective."""
    ttft_s, tbt_ms = run.slo_ttft_s, run.slo_tbt_ms
    done = [row for row in requests if row.status is Status.DONE]
    soon = [ttft_s is None or (row.ttft_s is not None and row.ttft_s <= ttft_s) for row in done]
    smooth = [tbt_ms is None or percentile(row.gaps_ms, 0.99) <= tbt_ms for row in done]
    attained = sum(a and b for a, b in zip(soon, smooth, strict=True))
    wanted = ttft_s is not None or tbt_ms is not None
    count = len(requests) or 1
    return {
        "ttft_s": ttft_s,
        "tbt_ms": tbt_ms,
        "goodput_req_s": attained / makespan_s if wanted and makespan_s else None,
        "attained_share": attained / count if wanted else None,
        "ttft_share": sum(soon) / count if ttft_s is not None else None,
        "tbt_share": sum(smooth) / count if tbt_ms is not None else None,
    }


def _cache(requests: Sequence[RequestRow]) -> dict[str, Any]:
    """Of requests with a first token: the others' use of the prefix cache is not known."""
    begun = [row for row in requests if row.ttft_s is not None]
    cached, prompt = sum(r.cached_tokens for r in begun), sum(r.prompt_tokens for r in begun)
    return {"cached_tokens": cached, "hit_share": cached / prompt if prompt else None}
