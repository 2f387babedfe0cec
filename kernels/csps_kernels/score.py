"""Which blocks of keys sampled rows attend to, without a matrix of rows by keys.

Three launches. `score_blocks`: log2 sum_{t in j} 2^(q.k_t) of every row and block, each block by
itself, and from these each row's log-sum-exp over all keys here. When the log-sum-exps over the
keys of all ranks are known, `block_masses` normalises, and takes the mean over a tile's rows.
Scores never leave the registers; what is kept between is 4 bytes per row and block.

Suffixes: K KV heads, N tiles, R rows of a tile (the M that choose before the E probes), X = N * R
rows, J blocks here, P pages, B tokens of a page, D head dim.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from csps_kernels.tiling import check_sizes

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))

# Scores of a program at a time: with more, the registers of 8 warps do not hold them.
MAX_SCORES = 128 * 128
MAX_ROWS = 128
# TMA copies at most 256 rows at a time, and a block's sum is taken in one piece.
MAX_PAGE_SIZE = 256
# Shared memory for pages under way: two programs fit a multiprocessor with their rows.
MAX_AHEAD_BYTES = 64 * 1024
# Programs see from one to all blocks: with many of them the late ones fill the gaps.
MIN_PROGRAMS = 2048
# Fewer keys do not pay for loading the rows.
MIN_KEYS_PER_PROGRAM = 512
# Rows and blocks of a program where 4 bytes per pair are read.
LSE_ROWS, LSE_BLOCKS = 32, 64
MASS_BLOCKS = 64


@triton.jit
def _score_span(
    q_XD,
    scale_X,
    position_X,
    inside_X,
    out_X,
    first,
    last,
    num_rows,
    k_desc,
    pages_ptr,
    blocks_ptr,
    PAGE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Blocks first..last of one KV head; `out_X` points to the first one's results.

    MASKED: keys behind a row's position do not count. Returns where the next results go.
    """
    for block in tl.range(first, last):
        page = tl.load(pages_ptr + block)
        k_BD = k_desc.load([page * PAGE, 0])
        scores_XB = tl.dot(q_XD, tl.trans(k_BD), input_precision="tf32x3")
        if MASKED:
            position_B = tl.load(blocks_ptr + block) * PAGE + tl.arange(0, PAGE)
            seen_XB = position_B[None, :] <= position_X[:, None]
            scores_XB = tl.where(seen_XB, scores_XB, float("-inf"))
        peak_X = tl.max(scores_XB, 1) * scale_X
        shift_X = tl.where(peak_X == float("-inf"), 0.0, peak_X)
        sum_X = tl.sum(tl.exp2(scores_XB * scale_X[:, None] - shift_X[:, None]), 1)
        tl.store(out_X, peak_X + tl.log2(sum_X), mask=inside_X)
        out_X += num_rows
    return out_X


# Integers that change from call to call must not each compile a kernel of their own.
@triton.jit(do_not_specialize=["num_rows", "num_blocks", "rows_per_tile", "blocks_per_program"])
def _score_blocks(
    q_ptr,
    scale_ptr,
    positions_ptr,
    whole_ptr,
    seen_ptr,
    k_desc,
    pages_ptr,
    blocks_ptr,
    out_ptr,
    num_rows,
    num_blocks,
    rows_per_tile,
    blocks_per_program,
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
):
    """One program: ROWS rows, of some tiles, against a range of blocks of their KV head.

    Neighbours read the same keys at about the same time, so these come from the L2 cache.
    """
    # Rows of the last tiles see most: they go first.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    start = tl.program_id(1) * blocks_per_program
    head = tl.program_id(2).to(tl.int64)
    last_row = tl.minimum(first_row + ROWS, num_rows) - 1
    stop = tl.minimum(start + blocks_per_program, num_blocks)
    stop = tl.minimum(stop, tl.load(seen_ptr + last_row // rows_per_tile))
    if start >= stop:
        return
    rows_X = first_row + tl.arange(0, ROWS)
    dims_D = tl.arange(0, DIM)
    inside_X = rows_X < num_rows
    at_X = head * num_rows + rows_X
    q_XD = tl.load(q_ptr + at_X[:, None] * DIM + dims_D[None, :], mask=inside_X[:, None], other=0.0)
    scale_X = tl.load(scale_ptr + at_X, mask=inside_X, other=1.0) * LOG2_E
    position_X = tl.load(positions_ptr + at_X, mask=inside_X, other=0)
    pages_ptr += head * num_blocks
    out_X = out_ptr + (head * num_blocks + start) * num_rows + rows_X
    # Only blocks from the first tile's own on can lie behind a row.
    whole = tl.load(whole_ptr + first_row // rows_per_tile)
    whole = tl.minimum(tl.maximum(whole, start), stop)
    out_X = _score_span(
        q_XD, scale_X, position_X, inside_X, out_X, start, whole, num_rows,
        k_desc, pages_ptr, blocks_ptr, PAGE, MASKED=False,
    )  # fmt: skip
    _score_span(
        q_XD, scale_X, position_X, inside_X, out_X, whole, stop, num_rows,
        k_desc, pages_ptr, blocks_ptr, PAGE, MASKED=True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "rows_per_tile"])
def _row_lse(
    block_lse_ptr,
    seen_ptr,
    lse_ptr,
    num_rows,
    num_blocks,
    rows_per_tile,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program: the natural log-sum-exp of ROWS rows over the blocks they see."""
    rows_X = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    inside_X = rows_X < num_rows
    seen_X = tl.load(seen_ptr + rows_X // rows_per_tile, mask=inside_X, other=0)
    block_lse_ptr += head * num_blocks * num_rows
    peak_X = tl.full([ROWS], float("-inf"), tl.float32)
    sum_X = tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, tl.max(seen_X, 0), BLOCKS):
        blocks_J = start + tl.arange(0, BLOCKS)
        at_JX = blocks_J[:, None].to(tl.int64) * num_rows + rows_X[None, :]
        seen_JX = blocks_J[:, None] < seen_X[None, :]
        part_JX = tl.load(block_lse_ptr + at_JX, mask=seen_JX, other=float("-inf"))
        new_peak_X = tl.maximum(peak_X, tl.max(part_JX, 0))
        shift_X = tl.where(new_peak_X == float("-inf"), 0.0, new_peak_X)
        sum_X = sum_X * tl.exp2(peak_X - shift_X)
        sum_X += tl.sum(tl.exp2(part_JX - shift_X[None, :]), 0)
        peak_X = new_peak_X
    lse_X = (peak_X + tl.log2(sum_X)) * LN_2
    tl.store(lse_ptr + head * num_rows + rows_X, lse_X, mask=inside_X)


@triton.jit(do_not_specialize=["num_blocks"])
def _block_masses(
    block_lse_ptr,
    total_ptr,
    seen_ptr,
    mean_ptr,
    probes_ptr,
    num_blocks,
    CHOSEN: tl.constexpr,
    PROBES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program: a tile's masses in BLOCKS blocks, 0 in those it does not see."""
    tile, num_tiles = tl.program_id(0), tl.num_programs(0)
    rows_per_tile: tl.constexpr = CHOSEN + PROBES
    blocks_J = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    head = tl.program_id(2).to(tl.int64)
    rows_R = tl.arange(0, ROWS)
    at_R = tile * rows_per_tile + rows_R
    total_ptr += head * num_tiles * rows_per_tile
    total_R = tl.load(total_ptr + at_R, mask=rows_R < rows_per_tile, other=0.0)
    # A row without any key: -inf - -inf would be NaN.
    total_R = tl.where(total_R == float("-inf"), 0.0, total_R * LOG2_E)
    seen_J = blocks_J < tl.load(seen_ptr + tile)
    at_J = head * num_blocks + blocks_J
    at_JR = at_J[:, None] * num_tiles * rows_per_tile + at_R[None, :]
    seen_JR = seen_J[:, None] & (rows_R < rows_per_tile)[None, :]
    part_JR = tl.load(block_lse_ptr + at_JR, mask=seen_JR, other=float("-inf"))
    mass_JR = tl.exp2(part_JR - total_R[None, :])
    chosen_JR = tl.where((rows_R < CHOSEN)[None, :], mass_JR, 0.0)
    mean_J = tl.sum(chosen_JR, 1)
    if CHOSEN > 1:
        mean_J /= CHOSEN
    inside_J = blocks_J < num_blocks
    pairs_J = (head * num_tiles + tile) * num_blocks + blocks_J
    tl.store(mean_ptr + pairs_J, mean_J, mask=inside_J)
    probes_JR = pairs_J[:, None] * PROBES + (rows_R - CHOSEN)[None, :]
    probing_R = (rows_R >= CHOSEN) & (rows_R < rows_per_tile)
    tl.store(probes_ptr + probes_JR, mass_JR, mask=inside_J[:, None] & probing_R[None, :])


def score_blocks(
    rows_KNRD: Tensor,
    scale_KNR: Tensor,
    positions_KNR: Tensor,
    tiles_N: Tensor,
    k_PBD: Tensor,
    pages_KJ: Tensor,
    blocks_J: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return (base-2 log-sum-exps by block [K, J, X], lse [K, N, R], natural); both fp32.

    A row's scores are q.k * scale (fp32, above 0). rows are of the keys' dtype (fp32, fp16,
    bf16), contiguous as these; pages_KJ are where the blocks blocks_J lie. Keys behind a row's
    position do not count, nor do blocks behind its tile. Tiles and blocks ascend; they, positions
    and pages are int64. Of the first result only the pairs are written whose tile is not before
    the block; lse is -inf where there is no key. B and D are powers of 2, 16 or more, B at most
    256: ValueError for others. Twin: csps_kernels.twins.score.
    """
    num_kv_heads, num_tiles, rows_per_tile, dim = rows_KNRD.shape
    num_blocks, (num_pages, page_size, _) = len(blocks_J), k_PBD.shape
    check_sizes(page_size=page_size, head_dim=dim)
    if page_size > MAX_PAGE_SIZE:
        raise ValueError(f"page size {page_size} is above {MAX_PAGE_SIZE}")
    num_rows = num_tiles * rows_per_tile
    block_lse_KJX = scale_KNR.new_empty(num_kv_heads, num_blocks, num_rows)
    lse_KNR = scale_KNR.new_full(scale_KNR.shape, -torch.inf)
    if not block_lse_KJX.numel():
        return block_lse_KJX, lse_KNR
    seen_N = seen_blocks(tiles_N, blocks_J)
    rows = _rows_per_program(num_rows, page_size)
    row_blocks = triton.cdiv(num_rows, rows)
    per_program = _blocks_per_program(row_blocks * num_kv_heads, num_blocks, page_size)
    page_bytes = page_size * dim * k_PBD.element_size()
    _score_blocks[(row_blocks, triton.cdiv(num_blocks, per_program), num_kv_heads)](
        rows_KNRD,
        scale_KNR.contiguous(),
        positions_KNR.to(torch.int32).contiguous(),
        torch.searchsorted(blocks_J, tiles_N, out_int32=True),
        seen_N,
        TensorDescriptor(k_PBD, [num_pages * page_size, dim], [dim, 1], [page_size, dim]),
        pages_KJ.to(torch.int32).contiguous(),
        blocks_J.to(torch.int32),
        block_lse_KJX,
        num_rows,
        num_blocks,
        rows_per_tile,
        per_program,
        ROWS=rows,
        PAGE=page_size,
        DIM=dim,
        num_warps=8 if rows * page_size > MAX_SCORES // 2 else 4,
        num_stages=max(min(MAX_AHEAD_BYTES // page_bytes, 3), 1),
    )
    _row_lse[(triton.cdiv(num_rows, LSE_ROWS), num_kv_heads)](
        block_lse_KJX,
        seen_N,
        lse_KNR,
        num_rows,
        num_blocks,
        rows_per_tile,
        ROWS=LSE_ROWS,
        BLOCKS=LSE_BLOCKS,
    )
    return block_lse_KJX, lse_KNR


def block_masses(
    block_lse_KJX: Tensor, total_lse_KNR: Tensor, seen_N: Tensor, num_chosen: int
) -> tuple[Tensor, Tensor]:
    """Return (mean mass of the first M rows of each tile [K, N, J], the others' [K, N, J, E]).

    fp32. `total_lse_KNR`: natural, over the keys of all ranks; `seen_N`: see `seen_blocks`.
    Masses of blocks behind a tile are 0.
    """
    num_kv_heads, num_tiles, rows_per_tile = total_lse_KNR.shape
    num_blocks = block_lse_KJX.shape[1]
    mean_KNJ = total_lse_KNR.new_empty(num_kv_heads, num_tiles, num_blocks)
    probes_KNJE = mean_KNJ.new_empty(*mean_KNJ.shape, rows_per_tile - num_chosen)
    if mean_KNJ.numel():
        _block_masses[(num_tiles, triton.cdiv(num_blocks, MASS_BLOCKS), num_kv_heads)](
            block_lse_KJX,
            total_lse_KNR.contiguous(),
            seen_N,
            mean_KNJ,
            probes_KNJE,
            num_blocks,
            CHOSEN=num_chosen,
            PROBES=rows_per_tile - num_chosen,
            ROWS=triton.next_power_of_2(max(rows_per_tile, 1)),
            BLOCKS=MASS_BLOCKS,
        )
    return mean_KNJ, probes_KNJE


def seen_blocks(tiles_N: Tensor, blocks_J: Tensor) -> Tensor:
    """How many of the blocks are not behind each tile: int32 [N]."""
    return torch.searchsorted(blocks_J, tiles_N, right=True, out_int32=True)


def _rows_per_program(num_rows: int, page_size: int) -> int:
    """A power of 2; the matrix units want 16 at least."""
    most = min(MAX_ROWS, MAX_SCORES // page_size)
    return min(max(triton.next_power_of_2(num_rows), 16), most)


def _blocks_per_program(num_programs: int, num_blocks: int, page_size: int) -> int:
    """All blocks where rows and heads fill the device, else a share of them."""
    shares = triton.cdiv(MIN_PROGRAMS, num_programs)
    fewest = triton.cdiv(MIN_KEYS_PER_PROGRAM, page_size)
    return max(triton.cdiv(num_blocks, shares), fewest)
