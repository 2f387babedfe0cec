"""core/shards.py: every position exactly once, balanced, block aligned."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csps.core.shards import Slice, num_blocks, prefill_stages, tokens_by_rank, zigzag

RANKS = st.integers(1, 8)
BLOCK = st.integers(1, 16)
TOKENS = st.integers(1, 2000)


def causal_pairs(slices: tuple[Slice, ...], num_ranks: int) -> list[int]:
    """(query, key) pairs each rank computes under a causal mask."""
    pairs = [0] * num_ranks
    for piece in slices:
        pairs[piece.rank] += sum(range(piece.start + 1, piece.stop + 1))
    return pairs


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)], ids=str)
def test_num_blocks_of_four_tokens(tokens: int, blocks: int) -> None:
    assert num_blocks(tokens, 4) == blocks


def test_zigzag_of_two_ranks() -> None:
    assert zigzag(0, 16, 2, 2) == (
        Slice(0, 0, 4),
        Slice(1, 4, 8),
        Slice(1, 8, 12),
        Slice(0, 12, 16),
    )


@given(first_block=st.integers(0, 50), num_tokens=TOKENS, num_ranks=RANKS, block_size=BLOCK)
def test_zigzag_covers_each_position_once_in_whole_blocks(
    first_block: int, num_tokens: int, num_ranks: int, block_size: int
) -> None:
    start = first_block * block_size
    slices = zigzag(start, start + num_tokens, num_ranks, block_size)
    at = start
    for piece in slices:
        assert piece.start == at
        assert piece.start % block_size == 0
        assert piece.stop > piece.start
        at = piece.stop
    assert at == start + num_tokens
    assert sum(tokens_by_rank(slices, num_ranks)) == num_tokens


@given(num_tokens=TOKENS, num_ranks=RANKS, block_size=BLOCK)
def test_zigzag_gives_no_rank_more_than_its_share_of_blocks(
    num_tokens: int, num_ranks: int, block_size: int
) -> None:
    blocks = [0] * num_ranks
    for piece in zigzag(0, num_tokens, num_ranks, block_size):
        blocks[piece.rank] += num_blocks(piece.num_tokens, block_size)
    assert max(blocks) == -(-sum(blocks) // num_ranks)
    assert max(blocks) - min(blocks) <= 2


@given(multiple=st.integers(1, 6), num_ranks=RANKS, block_size=BLOCK)
def test_zigzag_of_full_runs_balances_causal_work(
    multiple: int, num_ranks: int, block_size: int
) -> None:
    num_tokens = 2 * num_ranks * block_size * multiple
    pairs = causal_pairs(zigzag(0, num_tokens, num_ranks, block_size), num_ranks)
    assert len(set(pairs)) == 1


def test_zigzag_refuses_a_start_inside_a_block() -> None:
    with pytest.raises(AssertionError):
        zigzag(3, 8, 2, 4)


@given(
    num_tokens=TOKENS,
    num_ranks=RANKS,
    block_size=BLOCK,
    stage_tokens=st.integers(1, 500),
)
def test_stages_follow_each_other_and_all_but_the_last_are_even(
    num_tokens: int, num_ranks: int, block_size: int, stage_tokens: int
) -> None:
    unit = math.lcm(16, 2 * num_ranks) * block_size
    if unit > stage_tokens:
        unit = 2 * num_ranks * block_size
    stages = prefill_stages(num_tokens, num_ranks, block_size, stage_tokens)
    assert stages[0][0] == 0
    assert stages[-1][1] == num_tokens
    for (_, stop), (start, _) in pairwise(stages):
        assert start == stop
    for start, stop in stages[:-1]:
        assert (stop - start) % unit == 0
        shares = tokens_by_rank(zigzag(start, stop, num_ranks, block_size), num_ranks)
        assert len(set(shares)) == 1
    # One unit is the least a stage can be; otherwise stage_tokens is never exceeded.
    assert all(stop - start <= max(stage_tokens, unit) for start, stop in stages)


@given(num_tokens=TOKENS, block_size=BLOCK, stage_tokens=st.integers(1, 500))
def test_1_2_4_and_8_ranks_cut_the_same_stages_if_16_blocks_fit(
    num_tokens: int, block_size: int, stage_tokens: int
) -> None:
    cuts = {
        prefill_stages(num_tokens, num_ranks, block_size, stage_tokens)
        for num_ranks in (1, 2, 4, 8)
    }
    assert len(cuts) == 1 or 16 * block_size > stage_tokens
