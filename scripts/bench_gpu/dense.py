"""Dense causal attention by every kernel that this machine has: what sparsity is measured against.

Suffixes: T tokens, H query heads, K KV heads, D head dim.
"""

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from csps_kernels.causal import attention
from scripts.bench_gpu.bench import Bench, NotHereError, Row

OURS = "dense: ours"
FLASHINFER = "dense: flashinfer"
FLASH = "dense: torch flash"
CUDNN = "dense: torch cudnn"
# The best of these that ran is what others are compared with; cuDNN's stands beside them.
PEERS = (FLASH, FLASHINFER)
ALL = (OURS, *PEERS, CUDNN)
DENSE_REPEATS = 7


class Heads(NamedTuple):
    """Queries [H, T, D], keys and values [K, T, D] of one sequence."""

    q_HTD: Tensor
    k_KTD: Tensor
    v_KTD: Tensor

    @property
    def causal_flops(self) -> float:
        """Of both matrix products, of the pairs that causality lets see each other."""
        heads, tokens, dim = self.q_HTD.shape
        return 4.0 * heads * dim * tokens * (tokens + 1) / 2


def random_heads(bench: Bench, num_tokens: int) -> Heads:
    """Of the model's shape."""
    model = bench.sizes.model
    heads = model.num_heads, model.num_kv_heads, model.num_kv_heads
    return Heads(*(bench.normal(count, num_tokens, model.head_dim) for count in heads))


def measure(bench: Bench, heads: Heads, names: tuple[str, ...]) -> None:
    """A row of each of these dense kernels."""
    q, k, v = (x.unsqueeze(0) for x in heads)
    makers: dict[str, Callable[[], Callable[[], object]]] = {
        OURS: lambda: lambda: attention(q, k, v, causal=True),
        FLASH: lambda: _sdpa(SDPBackend.FLASH_ATTENTION, heads),
        CUDNN: lambda: _sdpa(SDPBackend.CUDNN_ATTENTION, heads),
        FLASHINFER: lambda: _flashinfer(heads),
    }
    for name in names:
        bench.case(name, functools.partial(_row, bench, makers[name], heads))


def _row(bench: Bench, make: Callable[[], Callable[[], object]], heads: Heads) -> Row:
    timing = bench.timer(make(), DENSE_REPEATS)
    return bench.beside_floor(timing, heads.causal_flops, sum(x.nbytes for x in heads))


def peer_s(bench: Bench) -> float | None:
    """Seconds of the best dense kernel of those that are the measure, if one ran."""
    times = [row["median_s"] for row in bench.rows if row["case"] in PEERS and "median_s" in row]
    return min(times, default=None)


def _sdpa(backend: SDPBackend, heads: Heads) -> Callable[[], object]:
    q_HTD, k_KTD, v_KTD = heads
    if q_HTD.device.type != "cuda" and backend is SDPBackend.CUDNN_ATTENTION:
        raise NotHereError("there is no cuDNN on a CPU")
    # Not every backend takes fewer KV heads: each query head has its own copy.
    group = len(q_HTD) // len(k_KTD)
    k_HTD, v_HTD = (x.repeat_interleave(group, dim=0) for x in (k_KTD, v_KTD))
    q, k, v = (x.unsqueeze(0) for x in (q_HTD, k_HTD, v_HTD))

    def attend() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def _flashinfer(heads: Heads) -> Callable[[], object]:
    try:
        attend = importlib.import_module("flashinfer").single_prefill_with_kv_cache
    except ModuleNotFoundError as error:
        raise NotHereError(f"{error.name} is not installed") from None
    q_THD, k_TKD, v_TKD = (x.transpose(0, 1).contiguous() for x in heads)
    return lambda: attend(q_THD, k_TKD, v_TKD, causal=True)
