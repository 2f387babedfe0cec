"""What a way to attend is worth: figures of one answer, and of all answers of a task.

A row is what csps.bench.quality writes of one prompt under one variant.
"""

import math
from collections.abc import Sequence
from itertools import takewhile
from statistics import fmean, stdev

from csps.bench.quality_prompts import NEEDLE_TASKS
from csps.core.attention import CONFIDENCE_Z

Row = dict[str, object]
Result = dict[str, object]

# Of a sparse prefill; their means over the prompts stand beside the score.
SPARSE_FIGURES = (
    "density", "union_density", "recall_mean", "recall_low", "recall_p5", "dense_share",
    "widened_share",
)  # fmt: skip
# Of every prefill; dense attention on one rank receives nothing to compare with.
PREFILL_FIGURES = (
    "ttft_s", "received_bytes_mean", "received_bytes_max", "received_over_dense_kv_mean",
    "received_over_dense_kv_max",
)  # fmt: skip


def wilson(num_correct: int, num_asked: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927), of `num_asked` >= 1 answers."""
    z2 = CONFIDENCE_Z**2
    share = num_correct / num_asked
    center = share + z2 / (2 * num_asked)
    spread = CONFIDENCE_Z * math.sqrt(
        share * (1 - share) / num_asked + z2 / (4 * num_asked * num_asked)
    )
    scale = 1 + z2 / num_asked
    return max((center - spread) / scale, 0.0), min((center + spread) / scale, 1.0)


def agreement(token_ids: Sequence[int], dense_ids: Sequence[int]) -> tuple[float, int]:
    """Share of equal positions of two equally long outputs, and length of their common prefix."""
    equal = [mine == other for mine, other in zip(token_ids, dense_ids, strict=True)]
    return fmean(equal), sum(takewhile(bool, equal))


def perplexity(logprobs: Sequence[float]) -> float:
    return math.exp(-fmean(logprobs))


def summarize(rows: Sequence[Row], tasks: Sequence[str]) -> list[Result]:
    """A result for each task, length and variant that has rows, in the order of the rows."""
    results = []
    for task in tasks:
        served = [row for row in rows if _serves(row, task)]
        groups = dict.fromkeys((row["tokens"], row["variant"]) for row in served)
        for tokens, variant in sorted(groups, key=lambda group: group[0]):  # type: ignore[arg-type, return-value]
            group = [row for row in served if (row["tokens"], row["variant"]) == (tokens, variant)]
            results.append(
                {"task": task, "tokens": tokens, "variant": variant, "prompts": len(group)}
                | _score(task, group)
                | _means(group)
            )
    return results


def _serves(row: Row, task: str) -> bool:
    """A prompt of real text serves two tasks at once."""
    return row["task"] == task if task in NEEDLE_TASKS else task in row


def _score(task: str, rows: Sequence[Row]) -> Result:
    if task in NEEDLE_TASKS:
        num_correct = sum(bool(row["correct"]) for row in rows)
        low, high = wilson(num_correct, len(rows))
        return {
            "score": f"{num_correct}/{len(rows)} [{low:.2f}, {high:.2f}]",
            "correct": num_correct,
            "accuracy": num_correct / len(rows),
            "accuracy_low": low,
            "accuracy_high": high,
        }
    found: list[dict[str, float]] = [row[task] for row in rows]  # type: ignore[misc]
    if task == "agreement":
        equal = fmean(one["equal"] for one in found)
        prefix = fmean(one["common_prefix"] for one in found)
        return {
            "score": f"{equal:.0%}, prefix {prefix:.1f}",
            "equal": equal,
            "common_prefix": prefix,
        }
    ratios = [one["over_dense"] for one in found]
    error = stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else None
    noise = "" if error is None else f" ± {error:.4f}"
    return {
        "score": f"{fmean(ratios):.4f}{noise} [{min(ratios):.4f}, {max(ratios):.4f}]",
        "ppl_over_dense": fmean(ratios),
        "ppl_over_dense_min": min(ratios),
        "ppl_over_dense_max": max(ratios),
        "ppl_over_dense_standard_error": error,
        "texts": [
            {"text": row["source"], **one} for row, one in zip(rows, found, strict=True)
        ],
    }  # fmt: skip


def _means(rows: Sequence[Row]) -> Result:
    """Means over the prompts; None of what no prompt has. Short prompts are never sparse."""
    reports: list[Row] = [row["sparse"] for row in rows if row["sparse"]]  # type: ignore[misc]
    return {
        "sparse_prompts": len(reports),
        **{name: _mean([report[name] for report in reports]) for name in SPARSE_FIGURES},
        **{name: _mean([row[name] for row in rows]) for name in PREFILL_FIGURES},
    }


def _mean(values: Sequence[object]) -> float | None:
    known = [value for value in values if isinstance(value, int | float)]
    return fmean(known) if known else None
