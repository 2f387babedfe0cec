"""Every kernel against its twin in fp32, on fresh random data.

What a kernel has not written is NaN: torch fills new memory with it for as long as this runs. So is
what it must not read. Each case runs twice, since an error that moves is a race.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from scripts.bench_gpu import parity_attention, parity_moves
from scripts.bench_gpu.bench import Bench, Row
from scripts.bench_gpu.parity_attention import Pair

# Of o and of whatever is of the model's type; log-sum-exps and masses are fp32.
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 5e-3, torch.float32: 1e-4}


def run(bench: Bench) -> None:
    """A row of each case: the relative error of each part, the largest one, and its limit."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    for source in (parity_attention.checks, parity_moves.checks):
        for name, make in source(bench):
            bench.case(name, functools.partial(_compare, make, LIMITS[bench.dtype]))
    torch.use_deterministic_algorithms(False)


def _compare(make: Callable[[], Pair], limit: float) -> Row:
    kernel, twin = make()
    first, second, expected = kernel(), kernel(), twin()
    errors = [relative_error(a, b) for a, b in zip(first, expected, strict=True)]
    apart = [relative_error(a, b) for a, b in zip(first, second, strict=True)]
    worst = max(errors)
    return {
        "errors": errors,
        "relative_error": worst,
        "limit": limit,
        "ok": worst < limit,
        "between_runs": max(apart),
    }


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|; infinite where NaN, or -inf in other places than expected."""
    got, expected = got.double(), expected.double()
    known = expected.isfinite()
    if got.shape != expected.shape or not torch.equal(got.isfinite(), known):
        return float("inf")
    difference = (got[known] - expected[known]).norm()
    return float(difference / expected[known].norm().clamp_min(1e-30))
