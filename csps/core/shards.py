"""Who computes and keeps which positions of a sequence: slices, zigzag order, block extents.

Ownership. A sequence's positions are cut into *blocks* of `block_size` tokens at
multiples of `block_size`. A block lives in one *page* of one rank (of the sequence
axis; with tensor parallelism every rank of that row holds its own heads of the page),
is written by the rank that computes it, and never moves while the request lives.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

# Unit of a prefill stage, in blocks.
STAGE_BLOCKS = 16


class Slice(NamedTuple):
    """Positions [start, stop) of one sequence, computed (and kept) by one rank."""

    rank: int
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


class Extent(NamedTuple):
    """`num_pages` consecutive blocks of a sequence, in consecutive pages of one rank.

    Extents of a sequence are listed in block order: the first one starts at block 0,
    each next one where the one before ended.
    """

    rank: int
    first_page: int
    num_pages: int


def num_blocks(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


def zigzag(start: int, stop: int, num_ranks: int, block_size: int) -> tuple[Slice, ...]:
    """Cut [start, stop) into 2P runs of whole blocks; rank r gets runs r and 2P-1-r.

    Under a causal mask this gives every rank the same work and leaves local windows
    local (the context parallelism of Llama 3, arXiv 2407.21783, section 3.3.2).
    `start` must be a multiple of `block_size`; runs that would be empty are left out.
    Returned in position order; run lengths differ by at most one block.
    """
    assert start % block_size == 0, (start, block_size)
    num_runs = 2 * num_ranks
    blocks = num_blocks(stop - start, block_size)
    base, extra = divmod(blocks, num_runs)
    slices = []
    at = start
    for run in range(num_runs):
        # Extra blocks go to the earliest runs: rank r of run r, so at most one per rank
        # until extra > P, and never more than two.
        length = (base + (1 if run < extra else 0)) * block_size
        end = min(at + length, stop)
        if end > at:
            rank = run if run < num_ranks else num_runs - 1 - run
            slices.append(Slice(rank, at, end))
        at = end
    return tuple(slices)


def prefill_stages(
    num_tokens: int, num_ranks: int, block_size: int, stage_tokens: int
) -> tuple[tuple[int, int], ...]:
    """Cut a long prompt into stages [start, stop) of nearly equal length, one per prefill step.

    Every stage but the last is a multiple of 2 * num_ranks blocks, so that each is balanced
    over the ranks exactly and only the last leaves a remainder. Where `stage_tokens` allows it
    is also a multiple of 16: then 1, 2, 4 and 8 ranks cut alike, and so keep the same blocks
    in a sparse prefill, which decides by stage. As few stages as `stage_tokens` allows; equal
    ones, because a short last stage would send all KV round the ring for a few queries.
    """
    unit = math.lcm(STAGE_BLOCKS, 2 * num_ranks) * block_size
    if unit > stage_tokens:
        unit = 2 * num_ranks * block_size
    longest = max(stage_tokens // unit, 1) * unit
    num_stages = -(-num_tokens // longest)
    stage = -(-num_tokens // (num_stages * unit)) * unit
    return tuple((at, min(at + stage, num_tokens)) for at in range(0, num_tokens, stage))


def tokens_by_rank(slices: Iterable[Slice], num_ranks: int) -> list[int]:
    """Tokens each rank computes (index = rank)."""
    totals = [0] * num_ranks
    for piece in slices:
        totals[piece.rank] += piece.num_tokens
    return totals
