"""Exact merge of any number of partial attention outputs for each row, in one launch.

With partial outputs o_i and log-sum-exps L_i: L = logsumexp(L_i), o = sum exp(L_i - L) o_i
(Flash-Decoding; FlashInfer, arXiv 2501.01005, section 2.2). Natural logarithm throughout.
Suffixes: T rows, M partials, H query heads, D head dim, S partials of a row taken at a time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from csps_kernels.tables import upload

AT_A_TIME = 16


class MergePlan(NamedTuple):
    """Row t's partials are index[starts[t] : starts[t + 1]]; int32 on the device."""

    starts: Tensor  # [T + 1]
    index: Tensor  # [M]


def plan_merge(
    rows_by_source: Sequence[np.ndarray], num_rows: int, device: torch.device
) -> MergePlan:
    """Partials lie source behind source; source s has one for each of rows_by_source[s]."""
    rows_M = np.concatenate([np.empty(0, np.int64), *rows_by_source])
    starts = np.concatenate(([0], np.cumsum(np.bincount(rows_M, minlength=num_rows))))
    return MergePlan(*upload([starts, np.argsort(rows_M, kind="stable")], device))


@triton.jit
def _merge(
    o_ptr,
    lse_ptr,
    starts_ptr,
    index_ptr,
    own_o_ptr,
    own_lse_ptr,
    out_ptr,
    out_lse_ptr,
    o_stride,
    lse_stride,
    out_stride,
    out_lse_stride,
    DIM: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One program: one head of one row. Strides are between rows, in elements."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims_D = tl.arange(0, DIM)
    if own_o_ptr is not None:
        own = row * tl.num_programs(1) + head
        highest = tl.load(own_lse_ptr + own)
        total = tl.where(highest == float("-inf"), 0.0, 1.0)
        acc_D = tl.load(own_o_ptr + own * DIM + dims_D) * total
    else:
        highest = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
        acc_D = tl.zeros([DIM], tl.float32)
    first = tl.load(starts_ptr + row)
    last = tl.load(starts_ptr + row + 1)
    for at in tl.range(first, last, AT_ONCE):
        places_S = at + tl.arange(0, AT_ONCE)
        inside_S = places_S < last
        parts_S = tl.load(index_ptr + places_S, mask=inside_S, other=0).to(tl.int64)
        lse_S = tl.load(lse_ptr + parts_S * lse_stride + head, mask=inside_S, other=float("-inf"))
        o_SD = tl.load(
            o_ptr + parts_S[:, None] * o_stride + head * DIM + dims_D[None, :],
            mask=inside_S[:, None],
            other=0.0,
        ).to(tl.float32)
        higher = tl.maximum(highest, tl.max(lse_S, 0))
        # No key so far: -inf - -inf is NaN; a finite stand-in makes all weights exp(-inf) = 0.
        stable = tl.where(higher == float("-inf"), 0.0, higher)
        weights_S = tl.exp(lse_S - stable)
        rescale = tl.exp(highest - stable)
        acc_D = acc_D * rescale + tl.sum(o_SD * weights_S[:, None], 0)
        total = total * rescale + tl.sum(weights_S, 0)
        highest = higher
    total = tl.where(total == 0.0, 1.0, total)
    out_D = (acc_D / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + head * DIM + dims_D, out_D)
    if out_lse_ptr is not None:
        tl.store(out_lse_ptr + row * out_lse_stride + head, highest + tl.log(total))


def merge(
    o_MHD: Tensor,
    lse_MH: Tensor,
    plan: MergePlan,
    out_THD: Tensor,
    out_lse_TH: Tensor | None = None,
    own: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fill out [T, H, D], of any float type, and the merged lse [T, H] fp32 if it is wanted.

    lse is fp32, o of any float type; the rows of all four may lie apart, as those of packed
    messages do. A partial that saw no key has lse = -inf and any finite o; a row without any
    gets out = 0, lse = -inf. `own`: one more partial of each row, (o [T, H, D] fp32, lse [T, H]),
    contiguous. D is a power of 2. Twin: csps_kernels.twins.merge.
    """
    num_rows, num_heads, dim = out_THD.shape
    if not out_THD.numel():
        return
    own_o_THD, own_lse_TH = own or (None, None)
    _merge[(num_rows, num_heads)](
        o_MHD,
        lse_MH,
        plan.starts,
        plan.index,
        own_o_THD,
        own_lse_TH,
        out_THD,
        out_lse_TH,
        o_MHD.stride(0),
        lse_MH.stride(0),
        out_THD.stride(0),
        0 if out_lse_TH is None else out_lse_TH.stride(0),
        DIM=dim,
        AT_ONCE=AT_A_TIME,
    )
