"""Which ranks hold a sequence: pure choices over counts."""

from collections.abc import Sequence

from csps.core.shards import Slice, num_blocks, prefill_stages, zigzag
from csps.sched.config import SchedulerConfig

# Slices of each prefill step of one sequence, in step order.
Stages = tuple[tuple[Slice, ...], ...]


def fits_kv(num_tokens: int, config: SchedulerConfig) -> bool:
    """Whether an empty KV cache holds a sequence of `num_tokens`.

    Counting all ranks together is exact: a sequence too big for one rank is split, a split
    one takes at most ceil(blocks / P) pages of a rank (zigzag gives rank r at most one
    block above another, and all stages but the last are even).
    """
    return num_blocks(num_tokens, config.block_size) <= config.total_pages


def is_split(num_tokens: int, config: SchedulerConfig) -> bool:
    """Whether a sequence goes over all ranks: it is long, or no single rank can hold it."""
    blocks = num_blocks(num_tokens, config.block_size)
    return num_tokens >= config.long_tokens or blocks > config.pages_per_rank


def first_stage_tokens(num_tokens: int, config: SchedulerConfig) -> int:
    """Tokens of the first stage of a split sequence."""
    stages = prefill_stages(num_tokens, config.num_ranks, config.block_size, config.stage_tokens)
    return stages[0][1]


def split_stages(num_tokens: int, config: SchedulerConfig) -> Stages:
    """Every stage of the sequence zigzagged over all ranks."""
    return tuple(
        zigzag(start, stop, config.num_ranks, config.block_size)
        for start, stop in prefill_stages(
            num_tokens, config.num_ranks, config.block_size, config.stage_tokens
        )
    )


def choose_whole_rank(blocks: int, free_pages: Sequence[int], loads: Sequence[int]) -> int | None:
    """Rank for a sequence of `blocks` blocks that stays whole, None if none has the pages.

    The least loaded one (`loads`: tokens each rank computes in this step), then the one
    with the most free pages.
    """
    fitting = [rank for rank, free in enumerate(free_pages) if free >= blocks]
    return min(fitting, key=lambda rank: (loads[rank], -free_pages[rank], rank), default=None)


def choose_growth_rank(
    blocks_by_rank: Sequence[int],
    free_pages: Sequence[int],
    masters: Sequence[int],
    *,
    stay_whole: bool,
) -> int | None:
    """Rank of a decoding sequence's next block, None if no rank has a page.

    The rank that writes the block computes the token (it is the step's master for this
    sequence), so new KV crosses no network. A whole sequence that may stay whole does so
    while its rank has a page. Otherwise the rank with the fewest of its blocks, so that
    shards stay balanced; then the one that masters the fewest sequences (`masters`) in
    this plan; then the one with the most free pages.
    """
    with_page = [rank for rank, free in enumerate(free_pages) if free > 0]
    holders = [rank for rank, blocks in enumerate(blocks_by_rank) if blocks > 0]
    if stay_whole and len(holders) == 1 and holders[0] in with_page:
        return holders[0]
    return min(
        with_page,
        key=lambda rank: (blocks_by_rank[rank], masters[rank], -free_pages[rank], rank),
        default=None,
    )
