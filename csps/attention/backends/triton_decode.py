"""Decode by Triton kernels (csps_kernels); only imported where triton is installed and chosen.

Suffixes: T, N rows, M partial outputs, H query heads, D head dim, B bytes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from csps.attention.backends import DecodeRows, MergeRows
from csps.attention.kv import KVStore
from csps.attention.merge import unpack
from csps.attention.shards import Run, page_lists
from csps_kernels import merge as kernel_merge
from csps_kernels import paged_decode as kernel_decode


def paged_decode(store: KVStore, shards: Sequence[tuple[Run, ...]]) -> DecodeRows:
    """See `PagedDecode`."""
    k_KPBD, _ = store.pages(0)
    num_kv_heads, _, page_size, _ = k_KPBD.shape
    plan = kernel_decode.plan_decode(
        *page_lists(shards, page_size),
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        num_processors=num_processors(k_KPBD.device),
        device=k_KPBD.device,
    )

    def attend(layer: int, q_NHD: Tensor, o_NHD: Tensor, lse_NH: Tensor) -> None:
        kernel_decode.paged_decode(q_NHD, *store.pages(layer), plan, o_NHD, lse_NH)

    return attend


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 where the interpreter runs."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def merge(rows_by_source: Sequence[np.ndarray], num_rows: int, device: torch.device) -> MergeRows:
    """See `Merge`."""
    plan = kernel_merge.plan_merge(rows_by_source, num_rows, device)

    def run(message_MB: Tensor, out_THD: Tensor, own: tuple[Tensor, Tensor] | None) -> None:
        _, num_heads, head_dim = out_THD.shape
        partials = unpack(message_MB, num_heads, head_dim, out_THD.dtype)
        kernel_merge.merge(*partials, plan, out_THD, own=own)

    return run
