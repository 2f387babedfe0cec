"""sched/ledger.py and sched/prefix_cache.py: what is evicted for whom, and what may not be."""

import pytest

from csps.core.shards import Extent, Slice
from csps.sched.ledger import Ledger
from csps.sched.pages import PageRun
from csps.sched.prefix_cache import NO_PREFIX
from tests.unit.prefix_sequences import ended, match, run


def test_cached_pages_count_as_free_and_are_taken_last() -> None:
    ledger = Ledger(1, 6, 2)
    ended(ledger, 1, range(8))
    assert ledger.free_by_rank() == [6]
    assert ledger.used_pages(0) == 0
    assert ledger.place(2, (Slice(0, 0, 4),)) == (Extent(0, 4, 2),)
    assert ledger.cache_stats.num_evictions == 0
    assert ledger.free_pages(0) == 4
    assert ledger.append(2, 0) == Extent(0, 3, 1), "the end of the chain goes first"
    assert ledger.cache_stats[:2] == (3, 1)
    assert match(ledger, range(9)).num_tokens == 6
    ledger.check_integrity([2])


def test_the_chain_released_first_is_evicted_first() -> None:
    ledger = Ledger(1, 6, 2)
    ended(ledger, 1, [1] * 4)
    ended(ledger, 2, [2] * 4)
    prefix = match(ledger, [1] * 5)
    run(ledger, 3, [1] * 5, prefix=prefix)
    ledger.free(3)
    ledger.place(4, (Slice(0, 0, 8),))
    assert match(ledger, [2] * 5) == NO_PREFIX, "looking is not using"
    assert match(ledger, [1] * 5).num_tokens == 4
    ledger.check_integrity([4])


def test_a_shared_beginning_outlives_its_continuations() -> None:
    ledger = Ledger(1, 4, 2)
    ended(ledger, 1, [0, 0, 1, 1])
    run(ledger, 2, [0, 0, 2, 2], prefix=match(ledger, [0, 0, 2, 2]))
    ledger.free(2)
    ledger.place(3, (Slice(0, 0, 6),))
    assert match(ledger, [0, 0, 1, 1, 1]).num_tokens == 2
    assert match(ledger, [0, 0, 2, 2, 2]).num_tokens == 2
    ledger.check_integrity([3])


def test_a_block_takes_what_follows_it_along_on_other_ranks() -> None:
    ledger = Ledger(2, 4, 2)
    ended(ledger, 1, range(12), ranks=(0, 1, 1))  # ranks of its blocks: 0 1 1 0 1 1
    ledger.place(2, (Slice(0, 0, 6),))
    assert match(ledger, range(13)).num_tokens == 6
    assert ledger.cache_stats[:2] == (3, 3)
    assert ledger.free_by_rank() == [1, 4]
    ledger.check_integrity([2])


def test_what_is_read_is_not_evicted() -> None:
    ledger = Ledger(1, 4, 2)
    run(ledger, 1, range(6))
    assert not ledger.can_place((Slice(0, 0, 4),))
    with pytest.raises(AssertionError, match="pages wanted"):
        ledger.place(2, (Slice(0, 0, 4),))
    assert match(ledger, range(7)).num_tokens == 6


def test_a_prefix_is_not_evicted_for_what_follows_it() -> None:
    ledger = Ledger(1, 4, 2)
    ended(ledger, 1, range(4))
    ended(ledger, 2, [9] * 4)
    tokens = [*range(4), 5, 5, 5, 5]
    prefix = match(ledger, tokens)
    assert ledger.free_by_rank() == [4]
    assert ledger.free_by_rank(prefix) == [2]
    assert not ledger.can_place((Slice(0, 4, 10),), prefix)
    with pytest.raises(AssertionError, match=r"\[3\] pages wanted, \[2\] free"):
        ledger.place(3, (Slice(0, 4, 10),), prefix)
    assert ledger.can_place((Slice(0, 4, 8),), prefix)
    assert ledger.place(3, (Slice(0, 4, 8),), prefix) == (Extent(0, 0, 4),)
    assert match(ledger, [9] * 5) == NO_PREFIX
    ledger.check_integrity([3])


def test_a_prefix_that_runs_pins_nothing_more() -> None:
    ledger = Ledger(1, 4, 2)
    run(ledger, 1, range(4))
    prefix = match(ledger, range(8))
    assert ledger.free_by_rank(prefix) == ledger.free_by_rank() == [2]
    assert ledger.can_place((Slice(0, 4, 8),), prefix)


def test_slices_start_where_the_prefix_ends() -> None:
    ledger = Ledger(1, 8, 2)
    run(ledger, 1, range(4))
    for start in (0, 2, 6):
        with pytest.raises(AssertionError, match="does not start at 4"):
            ledger.place(2, (Slice(0, start, 8),), match(ledger, range(8)))
    ledger.check_integrity([1])


def test_an_evicted_prefix_is_refused() -> None:
    ledger = Ledger(1, 4, 2)
    ended(ledger, 1, range(4))
    prefix = match(ledger, range(5))
    ledger.place(2, (Slice(0, 0, 8),))
    ledger.free(2)
    with pytest.raises(AssertionError, match="the prefix was evicted"):
        ledger.place(3, (Slice(0, 4, 5),), prefix)


def test_a_sequence_placed_again_finds_what_it_had() -> None:
    ledger = Ledger(1, 8, 2)
    run(ledger, 1, range(7))
    ledger.append(1, 0)
    ledger.free(1)
    prefix = match(ledger, range(9))
    assert prefix.num_tokens == 6
    assert ledger.place(1, (Slice(0, 6, 9),), prefix) == (Extent(0, 0, 5),)
    ledger.check_integrity([1])


def test_blocks_after_a_prefix_follow_its_pages() -> None:
    ledger = Ledger(1, 12, 2)
    ended(ledger, 1, [1] * 4)
    run(ledger, 2, range(6))
    ledger.place(3, (Slice(0, 0, 2),))
    ledger.free(2)
    ledger.place(4, (Slice(0, 0, 4),))
    ledger.free(3)
    tokens = [*range(8)]
    assert run(ledger, 5, tokens, prefix=match(ledger, tokens)) == (Extent(0, 2, 4),)


def test_scattered_free_pages_are_left_and_a_run_is_evicted() -> None:
    ledger = Ledger(1, 12, 1)
    for seq_id in range(8):
        ledger.place(seq_id, (Slice(0, 0, 1),))
    ended(ledger, 8, range(4))
    for seq_id in (1, 3, 5):
        ledger.free(seq_id)
    assert ledger.place(10, (Slice(0, 0, 2),)) == (Extent(0, 1, 1), Extent(0, 3, 1))
    ledger.free(10)
    assert ledger.place(11, (Slice(0, 0, 3),)) == (Extent(0, 9, 3),)
    assert ledger.cache_stats.num_evictions == 3


def test_blocks_appended_to_a_full_cache_lie_in_runs() -> None:
    ledger = Ledger(1, 1024, 1)
    ended(ledger, 1, range(1023))
    ledger.place(2, (Slice(0, 0, 1),))
    for _ in range(8):
        ledger.append(2, 0)
    assert ledger.extents(2)[1:] == (Extent(0, 1019, 4), Extent(0, 1015, 4))
    ledger.check_integrity([2])


def test_integrity_names_a_page_of_the_cache_owned_twice() -> None:
    ledger = Ledger(1, 4, 2)
    ended(ledger, 1, range(4))
    ledger._pages[0].free(PageRun(1, 1))
    with pytest.raises(AssertionError, match="owned by the free runs and the cache"):
        ledger.check_integrity([])


def test_integrity_counts_readers() -> None:
    ledger = Ledger(1, 4, 2)
    run(ledger, 1, range(4))
    match(ledger, range(5)).blocks[1].pages.clear()
    with pytest.raises(AssertionError, match="miscounts the readers"):
        ledger.check_integrity([1])


def test_integrity_misses_a_parent() -> None:
    ledger = Ledger(1, 4, 2)
    ended(ledger, 1, range(4))
    del ledger._cache._blocks[match(ledger, range(3)).blocks[0].key]
    with pytest.raises(AssertionError, match="a cached block's parent is not"):
        ledger.check_integrity([])


def test_integrity_misses_a_block_that_could_be_evicted() -> None:
    ledger = Ledger(1, 4, 2)
    ended(ledger, 1, range(4))
    ledger._cache._idle[0].popitem()
    with pytest.raises(AssertionError, match="cannot evict a block"):
        ledger.check_integrity([])
