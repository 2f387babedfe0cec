"""Block-sparse paged prefill attention with log-sum-exp: each item attends to its own pages.

Suffixes: I items, R rows of an item, P pages, B tokens of a page, D head dim, S parts of a list,
X = I * S, M rows of a program, N keys of a step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from csps_kernels.online_softmax import add_block, base_2_scale, finish
from csps_kernels.parts import choose_parts, merge_parts
from csps_kernels.tiling import check_sizes, choose_tiling

# Two programs to a multiprocessor of 65,536: one multiplies while the other exponentiates.
REGISTERS_OF_8_WARPS = 128


# Integers that change from call to call must not each compile a kernel of their own.
@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def _block_sparse(
    q_ptr,
    k_desc,
    v_desc,
    starts_ptr,
    pages_ptr,
    o_ptr,
    lse_ptr,
    num_rows,
    num_parts,
    scale,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One program: ROWS rows of an item over one part of its list.

    q is [I, R, D], o [I * S, R, D], starts [I * S + 1].
    """
    num_tiles = tl.cdiv(num_rows, ROWS)
    # The last items of a head have the longest lists: they go first.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    part = program // num_tiles
    rows_M = program % num_tiles * ROWS + tl.arange(0, ROWS)
    inside_M = rows_M < num_rows
    dims_D = tl.arange(0, DIM)
    q_rows_M = (part // num_parts).to(tl.int64) * num_rows + rows_M
    q_MD = tl.load(
        q_ptr + q_rows_M[:, None] * DIM + dims_D[None, :], mask=inside_M[:, None], other=0.0
    )
    acc_MD = tl.zeros([ROWS, DIM], tl.float32)
    max_M = tl.full([ROWS], float("-inf"), tl.float32)
    sum_M = tl.zeros([ROWS], tl.float32)
    STEPS: tl.constexpr = PAGE // KEYS
    first = tl.load(starts_ptr + part) * STEPS
    last = tl.load(starts_ptr + part + 1) * STEPS
    for step in tl.range(first, last):
        key = tl.load(pages_ptr + step // STEPS) * PAGE + step % STEPS * KEYS
        k_ND = k_desc.load([key, 0])
        scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="tf32x3")
        v_ND = v_desc.load([key, 0])
        acc_MD, max_M, sum_M = add_block(scores_MN, v_ND, acc_MD, max_M, sum_M, scale)
    o_MD, lse_M = finish(acc_MD, max_M, sum_M)
    o_rows_M = part.to(tl.int64) * num_rows + rows_M
    tl.store(
        o_ptr + o_rows_M[:, None] * DIM + dims_D[None, :],
        o_MD.to(o_ptr.dtype.element_ty),
        mask=inside_M[:, None],
    )
    tl.store(lse_ptr + o_rows_M, lse_M, mask=inside_M)


def block_sparse(
    q_IRD: Tensor,
    k_PBD: Tensor,
    v_PBD: Tensor,
    starts: Tensor,
    pages: Tensor,
    longest: int,
    *,
    num_parts: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return (o [I, R, D] in q's dtype, lse [I, R] fp32, natural log).

    Item i attends to all tokens of pages[starts[i] : starts[i + 1]], at most `longest` pages;
    without a page o = 0 and lse = -inf. starts [I + 1] and pages are int32 on the device of q; the
    host does not wait for them. q, k, v have one dtype (fp32, fp16, bf16); k and v are contiguous.
    B and D are powers of 2, 16 or more; P * B < 2**31. Scale is 1 / sqrt(D). Lists are cut into
    `num_parts` (0: as many as fill the device) that run beside one another. ValueError for other
    sizes. Twin: csps_kernels.twins.block_sparse.
    """
    num_items, num_rows, dim = q_IRD.shape
    num_pages, page_size, _ = k_PBD.shape
    check_sizes(head_dim=dim, page_size=page_size)
    if not q_IRD.numel():
        return torch.empty_like(q_IRD), q_IRD.new_empty(q_IRD.shape[:2], dtype=torch.float32)
    tiling = choose_tiling(num_rows, page_size, q_IRD.dtype)
    num_tiles = triton.cdiv(num_rows, tiling.rows)
    if not num_parts:
        num_parts = choose_parts(num_items * num_tiles, longest * page_size, q_IRD.device)
    num_lists = num_items * num_parts
    o_XRD = q_IRD.new_empty(
        num_lists, num_rows, dim, dtype=q_IRD.dtype if num_parts == 1 else torch.float32
    )
    lse_XR = q_IRD.new_empty(num_lists, num_rows, dtype=torch.float32)
    k_desc, v_desc = (
        TensorDescriptor(x, [num_pages * page_size, dim], [dim, 1], [tiling.keys, dim])
        for x in (k_PBD, v_PBD)
    )
    _block_sparse[(num_lists * num_tiles,)](
        q_IRD.contiguous(),
        k_desc,
        v_desc,
        _cut(starts, num_parts),
        pages,
        o_XRD,
        lse_XR,
        num_rows,
        num_parts,
        base_2_scale(dim),
        PAGE=page_size,
        DIM=dim,
        ROWS=tiling.rows,
        KEYS=tiling.keys,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        maxnreg=REGISTERS_OF_8_WARPS if tiling.num_warps == 8 else None,
    )
    if num_parts == 1:
        return o_XRD, lse_XR
    items_and_parts = (num_items, num_parts)
    return merge_parts(
        o_XRD.unflatten(0, items_and_parts), lse_XR.unflatten(0, items_and_parts), 1, q_IRD.dtype
    )


def _cut(starts: Tensor, num_parts: int) -> Tensor:
    """Starts of the parts of all lists: [I * S + 1]."""
    if num_parts == 1:
        return starts
    parts = torch.arange(num_parts, dtype=torch.int32, device=starts.device)
    before = starts.diff()[:, None] * parts // num_parts
    return torch.cat(((starts[:-1, None] + before).flatten(), starts[-1:]))
