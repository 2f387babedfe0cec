"""Which ranks hold a sequence: pure choices over counts."""

from collections.abc import Sequence

from csps.core.plan import Lane
from csps.core.shards import Slice, num_blocks, prefill_stages, zigzag
from csps.sched.config import SchedulerConfig

# Slices of each prefill step of one sequence, in step order.
Stages = tuple[tuple[Slice, ...], ...]


def fits_kv(num_tokens: int, config: SchedulerConfig) -> bool:
    """Whether an empty KV cache holds a sequence of `num_tokens` when prefill places it.

    Counting the ranks together is exact: a sequence too big for one rank is split, a split
    one takes at most ceil(blocks / P) pages of a rank (zigzag gives rank r at most one
    block above another, and all stages but the last are even).
    """
    return num_blocks(num_tokens, config.block_size) <= config.pages(Lane.PREFILL)


def is_split(num_new: int, config: SchedulerConfig) -> bool:
    """Whether `num_new` tokens of a sequence, all that are to be computed, go over all prefill
    ranks: they are many, or no single one holds them.
    """
    blocks = num_blocks(num_new, config.block_size)
    return num_new >= config.long_tokens or blocks > config.pages_per_rank


def first_stage_tokens(num_new: int, config: SchedulerConfig) -> int:
    """Tokens of the first stage of a split sequence."""
    return _stage_bounds(num_new, config)[0][1]


def split_stages(start: int, stop: int, config: SchedulerConfig) -> Stages:
    """Every stage of [start, stop) zigzagged over all prefill ranks."""
    ranks = config.ranks(Lane.PREFILL)
    return tuple(
        tuple(
            piece._replace(rank=ranks[piece.rank])
            for piece in zigzag(start + first, start + behind, len(ranks), config.block_size)
        )
        for first, behind in _stage_bounds(stop - start, config)
    )


def _stage_bounds(num_new: int, config: SchedulerConfig) -> tuple[tuple[int, int], ...]:
    num_ranks = len(config.ranks(Lane.PREFILL))
    return prefill_stages(num_new, num_ranks, config.block_size, config.stage_tokens)


def choose_whole_rank(
    ranks: Sequence[int],
    cached: Sequence[int],
    free_pages: Sequence[int],
    loads: Sequence[int],
) -> int | None:
    """Rank of `ranks`, those with room, for a sequence that stays whole; None if there is none.

    The one that has most of its cached blocks (`cached`, index = rank), so that the fewest
    travel; then the least loaded one (`loads`: tokens each rank computes in this step), then
    the one with the most free pages.
    """
    return min(
        ranks,
        key=lambda rank: (-cached[rank], loads[rank], -free_pages[rank], rank),
        default=None,
    )


def choose_growth_rank(
    ranks: Sequence[int],
    blocks_by_rank: Sequence[int],
    free_pages: Sequence[int],
    masters: Sequence[int],
    *,
    stay_whole: bool,
) -> int | None:
    """Rank of `ranks` for a decoding sequence's next block, None if none has a page.

    The rank that writes the block computes the token (it is the step's master for this
    sequence), so new KV crosses no network. A sequence that may stay whole goes to no
    further rank while one that holds it has a page. Otherwise the rank with the fewest of its
    blocks, so that shards stay balanced; then the one that masters the fewest sequences
    (`masters`) in this plan; then the one with the most free pages.
    """
    with_page = [rank for rank in ranks if free_pages[rank] > 0]
    holders = [rank for rank in with_page if blocks_by_rank[rank] > 0]
    return min(
        holders if stay_whole and holders else with_page,
        key=lambda rank: (blocks_by_rank[rank], masters[rank], -free_pages[rank], rank),
        default=None,
    )
