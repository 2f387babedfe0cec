"""Decode by Triton kernels (csps_kernels); only imported where triton is installed and chosen.

Suffixes: T, N rows, M partial outputs, H query heads, D head dim, B bytes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from csps.attention.backends import DecodeRows, FixedRows, MergeRows
from csps.attention.backends.decode_memory import DecodeBytes, DecodeShape, DecodeSteps
from csps.attention.kv import KVStore
from csps.attention.merge import unpack
from csps.attention.shards import Run, page_lists
from csps_kernels import merge as kernel_merge
from csps_kernels import paged_decode as kernel_decode
from csps_kernels.tables import ALIGNMENT


class PagedDecode:
    """See csps.attention.backends: `PagedDecode` and `FixedDecode`; and `SizedDecode`."""

    def __call__(self, store: KVStore, shards: Sequence[tuple[Run, ...]]) -> DecodeRows:
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

    def fixed(self, store: KVStore, num_rows: int) -> FixedRows:
        return _FixedRows(store, num_rows)

    def device_bytes(self, shape: DecodeShape, steps: DecodeSteps) -> DecodeBytes:
        """See `SizedDecode`. Chunks' outputs are one layer's; graphs keep memory of their own."""
        heads = shape.num_kv_heads, shape.num_processors

        def partials(num_rows: int) -> int:
            return kernel_decode.partial_bytes(
                num_rows,
                shape.num_heads,
                shape.head_dim,
                num_kv_heads=shape.num_kv_heads,
                num_processors=shape.num_processors,
            )

        num_pages = steps.num_rows * steps.pages_per_row
        fixed = steps.num_calls * kernel_decode.plan_bytes(steps.num_rows, num_pages, *heads)
        fixed += partials(steps.num_rows)
        if steps.fixed_rows:
            fixed += partials(max(steps.fixed_rows))
        for num_rows in steps.fixed_rows:
            # Pages are counted one by one; what pads their table is less than this.
            fixed += kernel_decode.plan_bytes(num_rows, 0, *heads) + 4 * ALIGNMENT
        return DecodeBytes(fixed, per_page=4 * sum(steps.fixed_rows))


class _FixedRows:
    """See `FixedRows`."""

    def __init__(self, store: KVStore, num_rows: int) -> None:
        k_KPBD, _ = store.pages(0)
        num_kv_heads, num_pages, page_size, _ = k_KPBD.shape
        self._store, self._num_rows, self._page_size = store, num_rows, page_size
        self._plan = kernel_decode.FixedPlan(
            num_rows,
            num_rows * num_pages,
            page_size=page_size,
            num_kv_heads=num_kv_heads,
            num_processors=num_processors(k_KPBD.device),
            device=k_KPBD.device,
        )

    def load(self, shards: Sequence[tuple[Run, ...]]) -> None:
        none: list[tuple[Run, ...]] = [()] * (self._num_rows - len(shards))
        self._plan.load(*page_lists([*shards, *none], self._page_size))

    def __call__(self, layer: int, q_NHD: Tensor, o_NHD: Tensor, lse_NH: Tensor) -> None:
        pages = self._store.pages(layer)
        kernel_decode.paged_decode(q_NHD, *pages, self._plan.plan, o_NHD, lse_NH)


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
