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

from csps.attention.backends import DecodeRows, FixedRows
from csps.attention.backends.decode_memory import DecodeBytes, DecodeShape, DecodeSteps
from csps.attention.backends.flashinfer_tables import (
    PageTable,
    decode_bytes,
    natural_log,
    page_table,
    uses_tensor_cores,
    workspace_bytes,
)
from csps.attention.backends.triton_decode import num_processors
from csps.attention.kv import KVStore
from csps.attention.shards import Run


class PagedDecode:
    """See csps.attention.backends: `PagedDecode` and `FixedDecode`; and `SizedDecode`.

    KV heads have `group_size` query heads each. A step's layers run on the stream that is current
    when it is prepared.
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
        table = page_table(shards, k_KPBD.shape[2])
        if not len(table.rows) or not len(k_KPBD):
            return _no_keys
        wrapper = self._take(k_KPBD)
        _plan(wrapper, table, k_KPBD, self._group_size)
        held_R = None
        if len(table.rows) < len(shards):
            held_R = table.rows.pin_memory().to(k_KPBD.device, non_blocking=True)
        rows = _Rows(wrapper, store, held_R)
        stream = torch.cuda.current_stream(k_KPBD.device)
        weakref.finalize(rows, self._give_back, wrapper, stream).atexit = False
        return rows

    def fixed(self, store: KVStore, num_rows: int) -> FixedRows:
        """See `FixedDecode`."""
        return _FixedRows(store, num_rows, self._group_size)

    def device_bytes(self, shape: DecodeShape, steps: DecodeSteps) -> DecodeBytes:
        """See `SizedDecode`."""
        return decode_bytes(shape, steps)

    def _take(self, like_KPBD: Tensor) -> BatchDecodeWithPagedKVCacheWrapper:
        """One whose buffers, pinned ones on the host among them, nobody reads any more."""
        for _ in range(self._idle.qsize()):
            with contextlib.suppress(queue.Empty):  # the other lane was faster
                wrapper, done = self._idle.get_nowait()
                if done.query():
                    return wrapper
                self._idle.put((wrapper, done))
        return BatchDecodeWithPagedKVCacheWrapper(
            _workspace(like_KPBD, self._group_size),
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
        kv_KPBD = self._store.pages(layer)
        if self._held_R is None:
            _attend(self._wrapper, kv_KPBD, q_NHD, o_NHD, lse_NH)
            return
        q_RHD = q_NHD[self._held_R]
        o_RHD, lse_RH = torch.empty_like(q_RHD), lse_NH.new_empty(q_RHD.shape[:2])
        _attend(self._wrapper, kv_KPBD, q_RHD, o_RHD, lse_RH)
        _no_keys(layer, q_NHD, o_NHD, lse_NH)
        o_NHD[self._held_R] = o_RHD.to(o_NHD.dtype)
        lse_NH[self._held_R] = lse_RH


class _FixedRows:
    """See `FixedRows`. A step has as many rows as any other: those without keys are given one.

    What comes of it is overwritten.
    """

    def __init__(self, store: KVStore, num_rows: int, group_size: int) -> None:
        k_KPBD, _ = store.pages(0)
        num_kv_heads, num_pages, _, _ = k_KPBD.shape
        self._store, self._num_rows, self._group_size = store, num_rows, group_size
        tables = [
            torch.zeros(size, dtype=torch.int32, device=k_KPBD.device)
            for size in (num_rows + 1, num_rows * num_pages, num_rows)
        ]
        self._wrapper = BatchDecodeWithPagedKVCacheWrapper(
            _workspace(k_KPBD, group_size, rows_in_graph=num_rows * num_kv_heads),
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=uses_tensor_cores(group_size),
            paged_kv_indptr_buffer=tables[0],
            paged_kv_indices_buffer=tables[1],
            paged_kv_last_page_len_buffer=tables[2],
        )
        self._empty_N = torch.ones(num_rows, dtype=torch.bool, device=k_KPBD.device)
        self._left = torch.cuda.Event()  # the host, by what was planned last
        self.load([])

    def load(self, shards: Sequence[tuple[Run, ...]]) -> None:
        k_KPBD, _ = self._store.pages(0)
        shards = [*shards, *[()] * (self._num_rows - len(shards))]
        self._left.synchronize()
        table = page_table([shard or (Run(0, 1),) for shard in shards], k_KPBD.shape[2])
        _plan(self._wrapper, table, k_KPBD, self._group_size)
        empty_N = torch.tensor([not shard for shard in shards]).pin_memory()
        self._empty_N.copy_(empty_N, non_blocking=True)
        self._left.record()

    def __call__(self, layer: int, q_NHD: Tensor, o_NHD: Tensor, lse_NH: Tensor) -> None:
        _attend(self._wrapper, self._store.pages(layer), q_NHD, o_NHD, lse_NH)
        o_NHD.masked_fill_(self._empty_N[:, None, None], 0.0)
        lse_NH.masked_fill_(self._empty_N[:, None], -torch.inf)


def _workspace(like_KPBD: Tensor, group_size: int, *, rows_in_graph: int = 0) -> Tensor:
    device = like_KPBD.device
    num_bytes = workspace_bytes(
        group_size, like_KPBD.shape[3], num_processors(device), rows_in_graph=rows_in_graph
    )
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)


def _plan(
    wrapper: BatchDecodeWithPagedKVCacheWrapper,
    table: PageTable,
    k_KPBD: Tensor,
    group_size: int,
) -> None:
    """The host waits for nothing: tables are pinned, and large ones go to the device by hand."""
    assert k_KPBD.stride(0) < 1 << 32, "its strides are 32 bits wide"
    num_kv_heads, _, page_size, head_dim = k_KPBD.shape
    indptr, indices, last_page_len = (x.pin_memory() for x in table[1:])
    wrapper.plan(
        indptr,
        indices.to(k_KPBD.device, non_blocking=True),
        last_page_len,
        num_kv_heads * group_size,
        num_kv_heads,
        head_dim,
        page_size,
        q_data_type=k_KPBD.dtype,
    )


def _attend(
    wrapper: BatchDecodeWithPagedKVCacheWrapper,
    kv_KPBD: tuple[Tensor, Tensor],
    q_RHD: Tensor,
    o_RHD: Tensor,
    lse_RH: Tensor,
) -> None:
    k_PKBD, v_PKBD = (x.transpose(0, 1) for x in kv_KPBD)
    # It writes contiguous rows, in q's dtype.
    in_place = o_RHD.dtype == q_RHD.dtype and o_RHD.is_contiguous()
    found_RHD, base_2_RH = wrapper.run(
        q_RHD, (k_PKBD, v_PKBD), out=o_RHD if in_place else None, return_lse=True
    )
    if not in_place:
        o_RHD.copy_(found_RHD)
    natural_log(base_2_RH, out=lse_RH)


def _no_keys(_layer: int, _q_NHD: Tensor, o_NHD: Tensor, lse_NH: Tensor) -> None:
    """The `DecodeRows` of a step of which no row has keys."""
    o_NHD.zero_()
    lse_NH.fill_(-torch.inf)
