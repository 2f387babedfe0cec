"""sched/ledger.py and sched/prefix_cache.py: which blocks are found, shared and kept."""

from array import array

import pytest

from csps.core.shards import Extent, Slice, num_blocks
from csps.sched.ledger import CacheStats, Ledger
from csps.sched.prefix_cache import NO_PREFIX
from tests.unit.prefix_sequences import EXACT, SPARSE, match, reader, run


@pytest.mark.parametrize(("num_tokens", "blocks"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_the_last_token_is_never_cached(num_tokens: int, blocks: int) -> None:
    ledger = Ledger(1, 8, 4)
    run(ledger, 1, range(12))
    prefix = match(ledger, range(num_tokens))
    assert len(prefix.blocks) == blocks
    assert prefix.num_tokens == 4 * blocks


def test_only_full_computed_blocks_are_published() -> None:
    ledger = Ledger(1, 8, 4)
    ledger.place(1, (Slice(0, 0, 12),))
    for num_computed, matched in [(0, 0), (3, 0), (4, 4), (7, 4), (11, 8)]:
        ledger.publish(1, reader(range(12)), num_computed, EXACT)
        assert match(ledger, range(20)).num_tokens == matched
        ledger.check_integrity([1])


def test_publish_reads_new_blocks_only() -> None:
    ledger = Ledger(1, 8, 4)
    ledger.place(1, (Slice(0, 0, 20),))
    asked = []

    def token_ids(start: int, stop: int) -> "array[int]":
        asked.append((start, stop))
        return array("I", range(start, stop))

    for num_computed in (8, 9, 9, 17):
        ledger.publish(1, token_ids, num_computed, EXACT)
    assert asked == [(0, 4), (4, 8), (8, 12), (12, 16)]


def test_running_sequences_share_pages() -> None:
    ledger = Ledger(2, 8, 2)
    first = run(ledger, 1, range(8), ranks=(0, 1))
    other = [0, 1, 2, 3, 9, 9, 9]
    prefix = match(ledger, other)
    assert ledger.prefix_by_rank(prefix) == [1, 1]
    second = run(ledger, 2, other, prefix=prefix, ranks=(1,))
    assert second == (*first[:2], Extent(1, 2, 2))
    assert [ledger.used_pages(rank) for rank in (0, 1)] == [2, 4]
    assert ledger.blocks_by_rank(2) == (1, 3)
    ledger.check_integrity([1, 2])
    ledger.free(1)
    assert [ledger.used_pages(rank) for rank in (0, 1)] == [1, 3]
    ledger.check_integrity([2])


def test_a_block_is_its_whole_prefix() -> None:
    ledger = Ledger(1, 8, 2)
    run(ledger, 1, [1, 2, 3, 4])
    assert match(ledger, [9, 2, 3, 4, 5]) == NO_PREFIX
    assert match(ledger, [3, 4, 5]) == NO_PREFIX
    assert match(ledger, [1, 2, 3, 9, 5]).num_tokens == 2


def test_a_salt_is_matched_only_where_it_is_asked_for() -> None:
    ledger = Ledger(1, 8, 2)
    run(ledger, 1, range(6), SPARSE)
    assert match(ledger, range(6), EXACT) == NO_PREFIX
    assert match(ledger, range(6), EXACT, SPARSE).num_tokens == 4
    assert match(ledger, range(6), "csa 0.9") == NO_PREFIX
    assert ledger.match(reader(range(6)), 6, ()) == NO_PREFIX


def test_of_equal_prefixes_the_preferred_salt_and_of_others_the_longest() -> None:
    ledger = Ledger(1, 16, 2)
    run(ledger, 1, range(6), SPARSE)
    run(ledger, 2, range(6), EXACT)
    run(ledger, 3, [*range(6), 8, 8], SPARSE)
    pages = {
        salts: [block.page.number for block in match(ledger, range(6), *salts).blocks]
        for salts in [(EXACT, SPARSE), (SPARSE, EXACT)]
    }
    assert pages == {(EXACT, SPARSE): [3, 4], (SPARSE, EXACT): [0, 1]}
    assert match(ledger, [*range(6), 8, 8, 8], EXACT, SPARSE).num_tokens == 8


def test_a_sparse_sequence_goes_on_from_exact_blocks() -> None:
    ledger = Ledger(1, 16, 2)
    run(ledger, 1, [0, 1, 2, 3, 7])
    tokens = [*range(8), 9]
    run(ledger, 2, tokens, SPARSE, match(ledger, tokens, SPARSE, EXACT))
    assert match(ledger, tokens, SPARSE, EXACT).num_tokens == 8
    assert match(ledger, tokens, EXACT).num_tokens == 4
    assert match(ledger, tokens, SPARSE) == NO_PREFIX
    ledger.check_integrity([1, 2])


def test_a_copy_serves_when_the_first_is_gone() -> None:
    ledger = Ledger(1, 8, 2)
    run(ledger, 1, [0, 1, 2, 3])
    run(ledger, 2, [0, 1, 2, 3, 4, 5])
    assert ledger.used_pages(0) == 5
    assert [block.page.number for block in match(ledger, range(7)).blocks] == [0, 1, 4]
    assert ledger.cache_stats.num_blocks == 3
    ledger.check_integrity([1, 2])
    ledger.free(1)
    assert [block.page.number for block in match(ledger, range(7)).blocks] == [2, 3, 4]
    assert ledger.used_pages(0) == 3
    ledger.check_integrity([2])


def test_a_page_that_nobody_reads_yields_to_a_copy() -> None:
    ledger = Ledger(1, 8, 2)
    run(ledger, 1, [0, 1])
    ledger.place(2, (Slice(0, 0, 2),))
    ledger.free(1)
    assert [block.page.number for block in match(ledger, range(3)).blocks] == [0]
    ledger.publish(2, reader([0, 1]), 2, EXACT)
    assert [block.page.number for block in match(ledger, range(3)).blocks] == [1]
    ledger.check_integrity([2])
    ledger.place(3, (Slice(0, 0, 14),))
    assert ledger.cache_stats.num_evictions == 0
    ledger.check_integrity([2, 3])


def test_off_nothing_is_kept() -> None:
    ledger = Ledger(1, 4, 2, prefix_cache=False)
    run(ledger, 1, range(4))
    assert match(ledger, range(5)) == NO_PREFIX
    ledger.free(1)
    ledger.check_integrity([])
    assert ledger.place(2, (Slice(0, 0, 8),)) == (Extent(0, 0, 4),)
    assert ledger.cache_stats == CacheStats(0, 0, 0, 0)


def test_stats_count_tokens_of_placed_sequences() -> None:
    ledger = Ledger(1, 8, 2)
    run(ledger, 1, range(5))
    for _ in range(3):
        match(ledger, range(7))
    assert ledger.cache_stats == CacheStats(2, 0, hit_tokens=0, query_tokens=5)
    run(ledger, 2, range(7), prefix=match(ledger, range(7)))
    assert ledger.cache_stats == CacheStats(3, 0, hit_tokens=4, query_tokens=12)


def test_num_blocks_counts_shared_ones() -> None:
    ledger = Ledger(1, 8, 2)
    run(ledger, 1, range(5))
    run(ledger, 2, range(9), prefix=match(ledger, range(9)))
    assert ledger.num_blocks(2) == num_blocks(9, 2)
