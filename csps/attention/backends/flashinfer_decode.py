"""Decode by FlashInfer; only imported where flashinfer is installed and wanted.

Suffixes: N rows, R rows that have keys, H query heads, K KV heads, P pages, B tokens of a page, D
head dim.
"""

import contextlib
import queue
import weakref
from collections.abc import Sequence

import torch
from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper
from torch import Tensor

from csps.attention.backends import DecodeRows
from csps.attention.backends.flashinfer_tables import (
    natural_log,
    page_table,
    uses_tensor_cores,
    workspace_bytes,
)
from csps.attention.backends.triton_decode import num_processors
from csps.attention.kv import KVStore
from csps.attention.shards import Run


class PagedDecode:
    """See csps.attention.backends.PagedDecode; KV heads have `group_size` query heads each.

    A step's layers run on the stream that is current when it is prepared.
    """

    def __init__(self, group_size: int) -> None:
        self._group_size = group_size
        # Wrappers of past steps, each with the event after which the GPU is done with it.
        # Both lanes take from it, and garbage collection gives back: at any time, in any thread.
        self._idle: queue.SimpleQueue[
            tuple[BatchDecodeWithPagedKVCacheWrapper, torch.cuda.Event]
        ] = queue.SimpleQueue()

    def __call__(self, store: KVStore, shards: Sequence[tuple[Run, ...]]) -> DecodeRows:
        k_KPBD, _ = store.pages(0)
        num_kv_heads, _, page_size, head_dim = k_KPBD.shape
        assert k_KPBD.stride(0) < 1 << 32, "its strides are 32 bits wide"
        table = page_table(shards, page_size)
        if not len(table.rows) or not num_kv_heads:
            return _no_keys
        wrapper = self._take(k_KPBD)
        # Pinned: else the host might wait for what the device has still to do.
        indptr, indices, last_page_len = (x.pin_memory() for x in table[1:])
        wrapper.plan(
            indptr,
            indices,
            last_page_len,
            num_kv_heads * self._group_size,
            num_kv_heads,
            head_dim,
            page_size,
            q_data_type=k_KPBD.dtype,
        )
        all_rows = len(table.rows) == len(shards)
        rows = _Rows(wrapper, store, None if all_rows else table.rows.to(k_KPBD.device))
        stream = torch.cuda.current_stream(k_KPBD.device)
        weakref.finalize(rows, self._give_back, wrapper, stream).atexit = False
        return rows

    def _take(self, like_KPBD: Tensor) -> BatchDecodeWithPagedKVCacheWrapper:
        """One whose buffers, pinned ones on the host among them, nobody reads any more."""
        for _ in range(self._idle.qsize()):
            with contextlib.suppress(queue.Empty):  # the other lane was faster
                wrapper, done = self._idle.get_nowait()
                if done.query():
                    return wrapper
                self._idle.put((wrapper, done))
        device, head_dim = like_KPBD.device, like_KPBD.shape[3]
        num_bytes = workspace_bytes(self._group_size, head_dim, num_processors(device))
        return BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(num_bytes, dtype=torch.uint8, device=device),
            "HND",
            use_tensor_cores=uses_tensor_cores(self._group_size),
        )

    def _give_back(
        self, wrapper: BatchDecodeWithPagedKVCacheWrapper, stream: torch.cuda.Stream
    ) -> None:
        done = torch.cuda.Event()
        done.record(stream)
        self._idle.put((wrapper, done))


class _Rows:
    """See `DecodeRows`. `held_R`: rows that have keys; None if all have."""

    def __init__(
        self, wrapper: BatchDecodeWithPagedKVCacheWrapper, store: KVStore, held_R: Tensor | None
    ) -> None:
        self._wrapper, self._store, self._held_R = wrapper, store, held_R

    def __call__(self, layer: int, q_NHD: Tensor, o_NHD: Tensor, lse_NH: Tensor) -> None:
        if self._held_R is None:
            self._attend(layer, q_NHD, o_NHD, lse_NH)
            return
        q_RHD = q_NHD[self._held_R]
        o_RHD, lse_RH = torch.empty_like(q_RHD), lse_NH.new_empty(q_RHD.shape[:2])
        self._attend(layer, q_RHD, o_RHD, lse_RH)
        _no_keys(layer, q_NHD, o_NHD, lse_NH)
        o_NHD[self._held_R] = o_RHD.to(o_NHD.dtype)
        lse_NH[self._held_R] = lse_RH

    def _attend(self, layer: int, q_RHD: Tensor, o_RHD: Tensor, lse_RH: Tensor) -> None:
        k_PKBD, v_PKBD = (x.transpose(0, 1) for x in self._store.pages(layer))
        # It writes contiguous rows, in q's dtype.
        in_place = o_RHD.dtype == q_RHD.dtype and o_RHD.is_contiguous()
        found_RHD, base_2_RH = self._wrapper.run(
            q_RHD, (k_PKBD, v_PKBD), out=o_RHD if in_place else None, return_lse=True
        )
        if not in_place:
            o_RHD.copy_(found_RHD)
        natural_log(base_2_RH, out=lse_RH)


def _no_keys(_layer: int, _q_NHD: Tensor, o_NHD: Tensor, lse_NH: Tensor) -> None:
    """The `DecodeRows` of a step of which no row has keys."""
    o_NHD.zero_()
    lse_NH.fill_(-torch.inf)
