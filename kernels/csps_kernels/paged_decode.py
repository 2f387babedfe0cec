"""Paged decode attention with log-sum-exp: single tokens, each over its own list of KV pages.

The rows' keys are cut into chunks that run beside one another, and then merged (split-K, as in
Flash-Decoding). The query heads of a KV head share its loads.

Suffixes: N rows, H query heads, K KV heads, P pages, B tokens of a page, D head dim, C chunks,
M query heads of a KV head (padded), L keys of a step.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from csps_kernels.merge import MergePlan, merge
from csps_kernels.online_softmax import add_block, base_2_scale, finish
from csps_kernels.tables import padded_size, upload

# Programs that a multiprocessor holds at a time, and how many times that many there should be:
# the more, the smaller the part of the device that idles at the end.
PROGRAMS_PER_PROCESSOR = 3
TURNS = 4
# A chunk has as many keys at least: below, its start and its merge cost more than it saves.
MIN_KEYS = 256
# Two buffers of keys and values: the load of their page's number takes stages too.
NUM_STAGES = 5


class DecodePlan(NamedTuple):
    """The rows of one step, the same in every layer; tables are int32 on the device."""

    chunks: Tensor  # [C, 3]: row, first place in `pages`, number of keys
    pages: Tensor
    parts: MergePlan  # a row's chunks


def plan_decode(
    starts: np.ndarray,
    pages: np.ndarray,
    lengths: np.ndarray,
    *,
    page_size: int,
    num_kv_heads: int,
    num_processors: int,
    device: torch.device,
) -> DecodePlan:
    """Row i attends to the first lengths[i] keys (any number) of pages[starts[i] : starts[i + 1]].

    All three int64, and no page more than the keys take. `num_processors`: multiprocessors of
    the device, which the chunks are to fill.
    """
    tables = _tables(starts, pages, lengths, page_size, num_kv_heads, num_processors)
    chunks_C3, pages_P, starts_N, index_C = upload(tables, device)
    return DecodePlan(chunks_C3, pages_P, MergePlan(starts_N, index_C))


class FixedPlan:
    """Plans of steps of `num_rows` rows, one after the other, at one place on the device.

    What was launched with `plan` runs again for other rows once they are loaded: a CUDA graph
    can. Its grid is that of the most chunks there can be; those that a step has not have no keys.
    """

    def __init__(
        self,
        num_rows: int,
        max_pages: int,
        *,
        page_size: int,
        num_kv_heads: int,
        num_processors: int,
        device: torch.device,
    ) -> None:
        """`max_pages`: of all rows together."""
        self._shape = page_size, num_kv_heads, num_processors
        shapes = _shapes(num_rows, max_pages, num_kv_heads, num_processors)
        sizes = [padded_size(math.prod(shape)) for shape in shapes]
        self._table = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self._places = [sum(sizes[:part]) for part in range(len(sizes))]
        chunks_C3, starts_N, index_C, pages_P = (
            self._table[place : place + math.prod(shape)].view(shape)
            for place, shape in zip(self._places, shapes, strict=True)
        )
        self.plan = DecodePlan(chunks_C3, pages_P, MergePlan(starts_N, index_C))

    def load(self, starts: np.ndarray, pages: np.ndarray, lengths: np.ndarray) -> None:
        """As of `plan_decode`, in one transfer that the host does not wait for."""
        chunks_C3, pages, first_chunks, parts = _tables(starts, pages, lengths, *self._shape)
        assert len(chunks_C3) <= len(self.plan.chunks), "more chunks than max_chunks"
        assert len(pages) <= len(self.plan.pages), "more pages than max_pages"
        size = self._places[-1] + len(pages)
        host = torch.zeros(size, dtype=torch.int32, pin_memory=self._table.is_cuda)
        table = host.numpy()
        for place, array in zip(self._places, (chunks_C3, first_chunks, parts, pages), strict=True):
            table[place : place + array.size] = array.ravel()
        self._table[:size].copy_(host, non_blocking=True)


def max_chunks(num_rows: int, num_kv_heads: int, num_processors: int) -> int:
    """More than any `num_rows` rows are cut into.

    Of n keys in all, in chunks of c: n / c, one more a row as its last page and its last chunk
    may be partly filled. c is at least MIN_KEYS, and n / programs a KV head, rounded down.
    """
    programs = num_processors * PROGRAMS_PER_PROCESSOR * TURNS
    return programs * (MIN_KEYS + 1) // (MIN_KEYS * num_kv_heads) + 2 * num_rows + 1


def plan_bytes(num_rows: int, max_pages: int, num_kv_heads: int, num_processors: int) -> int:
    """Of the tables of a `FixedPlan`, and of a `DecodePlan` of as many rows and pages at most."""
    shapes = _shapes(num_rows, max_pages, num_kv_heads, num_processors)
    return 4 * sum(padded_size(math.prod(shape)) for shape in shapes)


def partial_bytes(
    num_rows: int, num_heads: int, head_dim: int, *, num_kv_heads: int, num_processors: int
) -> int:
    """Of the chunks' outputs and log-sum-exps, while `paged_decode` runs; at most."""
    chunks = max_chunks(num_rows, num_kv_heads, num_processors)
    return 4 * chunks * num_heads * (head_dim + 1)


def _shapes(
    num_rows: int, max_pages: int, num_kv_heads: int, num_processors: int
) -> list[tuple[int, ...]]:
    """Of chunks, the rows' first chunks, their order, and pages, where there are most.

    Pages come last, so that what a step has of them ends what is copied.
    """
    chunks = max_chunks(num_rows, num_kv_heads, num_processors)
    return [(chunks, 3), (num_rows + 1,), (chunks,), (max_pages,)]


def _tables(
    starts: np.ndarray,
    pages: np.ndarray,
    lengths: np.ndarray,
    page_size: int,
    num_kv_heads: int,
    num_processors: int,
) -> list[np.ndarray]:
    """Those of a DecodePlan, on the host."""
    num_pages = np.diff(starts)
    assert (num_pages == -(-lengths // page_size)).all(), "pages do not match lengths"
    programs = num_processors * PROGRAMS_PER_PROCESSOR * TURNS
    chunk_keys = max(int(lengths.sum()) * num_kv_heads // programs, MIN_KEYS)
    chunk_pages = -(-chunk_keys // page_size)
    # To the nearest, so that all rows together have about as many as there should be.
    num_chunks = np.maximum((num_pages + chunk_pages // 2) // chunk_pages, num_pages > 0)
    first_chunks = np.concatenate(([0], np.cumsum(num_chunks)))
    row_C = np.repeat(np.arange(len(lengths)), num_chunks)
    nth_C = np.arange(len(row_C)) - first_chunks[row_C]
    # Chunks of a row differ by one page at most.
    first_C, behind_C = ((nth_C + i) * num_pages[row_C] // num_chunks[row_C] for i in (0, 1))
    keys_C = np.minimum(behind_C * page_size, lengths[row_C]) - first_C * page_size
    chunks = np.stack((row_C, starts[row_C] + first_C, keys_C), axis=1)
    # Long ones go first, so that short ones fill the gaps at the end.
    order = np.argsort(-keys_C, kind="stable")
    parts = np.empty_like(order)
    parts[order] = np.arange(len(order))
    return [chunks[order], pages, first_chunks, parts]


@triton.jit
def _attend_chunk(
    q_ptr,
    k_ptr,
    v_ptr,
    chunks_ptr,
    pages_ptr,
    o_ptr,
    lse_ptr,
    q_stride,
    kv_stride,
    scale,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One program: one chunk of a row, for the GROUP query heads of one KV head.

    o is [C, H, D] fp32. Strides: between rows of q, between KV heads of k and v; in elements.
    """
    chunk = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.load(chunks_ptr + chunk * 3)
    pages_ptr += tl.load(chunks_ptr + chunk * 3 + 1)
    num_keys = tl.load(chunks_ptr + chunk * 3 + 2)
    dims_D = tl.arange(0, DIM)
    inside_M = tl.arange(0, ROWS) < GROUP
    heads_M = kv_head * GROUP + tl.arange(0, ROWS)
    q_MD = tl.load(
        q_ptr + row.to(tl.int64) * q_stride + heads_M[:, None] * DIM + dims_D[None, :],
        mask=inside_M[:, None],
        other=0.0,
    )
    k_ptr += kv_head.to(tl.int64) * kv_stride
    v_ptr += kv_head.to(tl.int64) * kv_stride
    acc_MD = tl.zeros([ROWS, DIM], tl.float32)
    max_M = tl.full([ROWS], float("-inf"), tl.float32)
    sum_M = tl.zeros([ROWS], tl.float32)
    for key in tl.range(0, num_keys, KEYS):
        keys_L = key + tl.arange(0, KEYS)
        seen_L = keys_L < num_keys
        if PAGE % KEYS == 0:
            page = tl.load(pages_ptr + key // PAGE).to(tl.int64)
            slots_L = page * PAGE + key % PAGE + tl.arange(0, KEYS)
        else:
            page_L = tl.load(pages_ptr + keys_L // PAGE, mask=seen_L, other=0).to(tl.int64)
            slots_L = page_L * PAGE + keys_L % PAGE
        places_LD = slots_L[:, None] * DIM + dims_D[None, :]
        k_LD = tl.load(k_ptr + places_LD, mask=seen_L[:, None], other=0.0)
        scores_ML = tl.dot(q_MD, tl.trans(k_LD), input_precision="ieee")
        scores_ML = tl.where(seen_L[None, :], scores_ML, float("-inf"))
        # Zeros where there is no key: what was never written may be NaN, and 0 NaN is NaN.
        v_LD = tl.load(v_ptr + places_LD, mask=seen_L[:, None], other=0.0)
        acc_MD, max_M, sum_M = add_block(scores_ML, v_LD, acc_MD, max_M, sum_M, scale)
    o_MD, lse_M = finish(acc_MD, max_M, sum_M)
    outs_M = chunk.to(tl.int64) * tl.num_programs(1) * GROUP + heads_M
    tl.store(o_ptr + outs_M[:, None] * DIM + dims_D[None, :], o_MD, mask=inside_M[:, None])
    tl.store(lse_ptr + outs_M, lse_M, mask=inside_M)


def paged_decode(
    q_NHD: Tensor,
    k_KPBD: Tensor,
    v_KPBD: Tensor,
    plan: DecodePlan,
    o_NHD: Tensor,
    lse_NH: Tensor,
) -> None:
    """Fill o [N, H, D], of any float type, and lse [N, H] fp32, natural log.

    q, k, v have one dtype (fp32, fp16, bf16); D is a power of 2, 16 or more; B is any, fastest
    if a multiple of 64. Rows of q, o and lse may lie apart, and KV heads. A row without keys gets
    o = 0, lse = -inf. Scale is 1 / sqrt(D). Twin: csps_kernels.twins.paged_decode.
    """
    _, num_heads, dim = q_NHD.shape
    num_kv_heads, _, page_size, _ = k_KPBD.shape
    num_chunks = len(plan.chunks)
    o_CHD = q_NHD.new_empty(num_chunks, num_heads, dim, dtype=torch.float32)
    lse_CH = o_CHD.new_empty(num_chunks, num_heads)
    if o_CHD.numel():
        group = num_heads // num_kv_heads
        _attend_chunk[(num_chunks, num_kv_heads)](
            q_NHD,
            k_KPBD,
            v_KPBD,
            plan.chunks,
            plan.pages,
            o_CHD,
            lse_CH,
            q_NHD.stride(0),
            k_KPBD.stride(0),
            base_2_scale(dim),
            GROUP=group,
            PAGE=page_size,
            DIM=dim,
            ROWS=max(triton.next_power_of_2(group), 16),
            KEYS=32 if q_NHD.dtype == torch.float32 else 64,
            num_warps=4,
            num_stages=NUM_STAGES,
        )
    merge(o_CHD, lse_CH, plan.parts, o_NHD, lse_NH)
