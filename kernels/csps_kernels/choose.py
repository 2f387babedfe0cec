"""The fewest blocks that hold enough of each tile's attention mass, without sorting.

Suffixes: K KV heads, N tiles, J blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A mass in fp16 is a whole number of these: sums of integers are exact in any order.
UNITS = tl.constexpr(2**24)
# What may be lost is a whole number of 2**-30 of a tile's mass.
SHARE_BITS = tl.constexpr(30)
# fp16 below 2 as integers of 14 bits: in the order of the numbers they stand for.
MASS_BITS, HIGHEST_BIT = tl.constexpr(14), tl.constexpr(2**13)
ABOVE_ALL = tl.constexpr(2**14)
BLOCKS_PER_WARP = 512
MAX_WARPS = 16


# Integers that change from call to call must not each compile a kernel of their own.
@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "share"])
def _choose(
    mass_ptr,
    tiles_ptr,
    keep_ptr,
    num_tiles,
    num_blocks,
    share,
    WINDOW: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program: a tile of one KV head. A share below 0 stands for losing nothing at all."""
    row = tl.program_id(0)
    tile = tl.load(tiles_ptr + row % num_tiles)
    blocks_J = tl.arange(0, BLOCKS)
    inside_J = blocks_J < num_blocks
    visible_J = inside_J & (blocks_J <= tile)
    forced_J = (blocks_J == 0) | (blocks_J >= tile - WINDOW)
    at_J = row.to(tl.int64) * num_blocks + blocks_J
    mass_J = tl.load(mass_ptr + at_J, mask=visible_J, other=0.0)
    units_J = (mass_J.to(tl.float32) * UNITS).to(tl.int32)
    allowed = ((tl.sum(units_J, 0).to(tl.int64) * share) >> SHARE_BITS).to(tl.int32)
    allowed = tl.where(share < 0, -1, allowed)
    # What is kept anyway, and what is not there, is above every limit.
    bits_J = mass_J.to(tl.int16, bitcast=True).to(tl.int32)
    bits_J = tl.where(visible_J & ~forced_J, bits_J, ABOVE_ALL)
    # Bisection: the highest limit below which everything may go.
    limit = 0
    for bit in tl.static_range(MASS_BITS):
        higher = limit | (HIGHEST_BIT >> bit)
        lost = tl.sum(tl.where(bits_J < higher, units_J, 0), 0)
        limit = tl.where(lost <= allowed, higher, limit)
    left = allowed - tl.sum(tl.where(bits_J < limit, units_J, 0), 0)
    # Of those that equal the limit the last ones go.
    equal_J = bits_J == limit
    each = tl.max(tl.where(equal_J, units_J, 0), 0)
    num_kept = tl.sum(equal_J.to(tl.int32), 0) - left // tl.maximum(each, 1)
    keep_J = (bits_J > limit) | (equal_J & (tl.cumsum(equal_J.to(tl.int32), 0) <= num_kept))
    tl.store(keep_ptr + at_J, (keep_J & visible_J).to(tl.uint8), mask=inside_J)


def choose(mass_KNJ: Tensor, tiles_N: Tensor, gamma: float, window: int) -> Tensor:
    """Which blocks each tile keeps, at least `gamma` of its mass: bool [K, N, J].

    Block 0, the tile's own and `window` before it always; then, as the rest goes in order of
    mass, the largest, and of equal ones the first. Blocks behind the tile never; gamma 1 keeps
    all others. Masses are fp16, contiguous, below 2; tiles int64. Twin: csps_kernels.twins.choose.
    """
    num_kv_heads, num_tiles, num_blocks = mass_KNJ.shape
    keep = torch.empty(mass_KNJ.shape, dtype=torch.uint8, device=mass_KNJ.device)
    if keep.numel():
        blocks = triton.next_power_of_2(num_blocks)
        share = round((1.0 - gamma) * (1 << SHARE_BITS.value)) if gamma < 1.0 else -1
        _choose[(num_kv_heads * num_tiles,)](
            mass_KNJ,
            tiles_N.to(torch.int32),
            keep,
            num_tiles,
            num_blocks,
            share,
            WINDOW=window,
            BLOCKS=blocks,
            num_warps=min(max(blocks // BLOCKS_PER_WARP, 1), MAX_WARPS),
        )
    return keep.view(torch.bool)
