"""What `bench strategies` makes of the requests it sent: figures, and the best configurations."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from statistics import fmean

from csps.bench.strategies_load import Kind
from csps.percentiles import percentile

Row = dict[str, object]

UNFINISHED = "had not ended when the drain was over"
BEST_RULE = (
    "of each strategy: fewest failed requests, then the lowest mean response time of all requests"
)
LOWER_BOUNDS = (
    "requests that had not ended are among the failed ones, and in the figures with the time they "
    "had waited by then, as TTFT (without a first token), as last gap and as response time: lower "
    "bounds; requests that ended with an error are in no figure"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One request as its client saw it; times from when it was sent.

    `ttft_s` without a first token, `response_s` and the last gap of an unfinished request: how
    long it had waited.
    """

    kind: Kind
    at_s: float  # when it was to be sent, after the first
    sent_s: float  # when it was
    prompt_tokens: int
    output_tokens: int  # that came
    error: str | None
    ttft_s: float
    response_s: float
    gaps_ms: tuple[float, ...]


def summarize(samples: Sequence[Sample]) -> Row:
    """Figures of one configuration: latencies by kind, throughput from first to last."""
    makespan_s = max(sample.sent_s + sample.response_s for sample in samples)
    prefilled = sum(sample.prompt_tokens for sample in samples if sample.output_tokens)
    output = sum(sample.output_tokens for sample in samples)
    by_kind = {kind: [s for s in samples if s.kind is kind] for kind in Kind}
    groups = {**{kind.value: found for kind, found in by_kind.items()}, "all": [*samples]}
    return {
        "makespan_s": makespan_s,
        "prefill_tok_s": prefilled / makespan_s,
        "output_tok_s": output / makespan_s,
        "late_s_max": max(sample.sent_s - sample.at_s for sample in samples),
        "figures": {name: _figures(group) for name, group in groups.items()},
    }


def _figures(samples: Sequence[Sample]) -> Row:
    timed = [sample for sample in samples if sample.error in (None, UNFINISHED)]
    return {
        "count": len(samples),
        "failed": sum(sample.error is not None for sample in samples),
        "ttft_s": _spread([sample.ttft_s for sample in timed]),
        "tbt_ms": _spread([*chain.from_iterable(sample.gaps_ms for sample in timed)]),
        "tbt_ms_max": _spread([max(sample.gaps_ms) for sample in timed if sample.gaps_ms]),
        "response_s": _spread([sample.response_s for sample in timed]),
    }


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """None of nothing."""
    if not values:
        return {"mean": None, "p50": None, "p99": None}
    return {
        "mean": fmean(values),
        "p50": percentile(values, 0.5),
        "p99": percentile(values, 0.99),
    }


def mark_best(rows: Sequence[Row]) -> list[Row]:
    """The rows, each with `best` by BEST_RULE: exactly one of each strategy."""
    best: dict[object, Row] = {}
    for row in rows:
        known = best.get(row["strategy"])
        if known is None or _rank(row) < _rank(known):
            best[row["strategy"]] = row
    return [{**row, "best": best[row["strategy"]] is row} for row in rows]


def _rank(row: Row) -> tuple[int, float]:
    figures = row["figures"]["all"]  # type: ignore[index]
    mean = figures["response_s"]["mean"]
    return figures["failed"], float("inf") if mean is None else mean


def request_rows(samples: Sequence[Sample]) -> list[Row]:
    """The samples as the record holds them."""
    return [asdict(sample) for sample in samples]
