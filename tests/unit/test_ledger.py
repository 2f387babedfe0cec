"""sched/pages.py and sched/ledger.py: no page lost, none owned twice, runs kept whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csps.core.shards import Extent, Slice, num_blocks, zigzag
from csps.sched.ledger import Ledger
from csps.sched.pages import PageAllocator, PageRun


def allocate(pages: PageAllocator, num: int, after: int = -1) -> list[PageRun]:
    runs = pages.find(num, after)
    pages.take(runs)
    return runs


def pages_of(runs: list[PageRun]) -> list[int]:
    return [page for first, num in runs for page in range(first, first + num)]


def fragmented(num_pages: int, free: list[PageRun]) -> PageAllocator:
    """An allocator in which exactly the runs of `free` are free."""
    pages = PageAllocator(num_pages)
    allocate(pages, num_pages)
    for run in free:
        pages.free(run)
    return pages


def test_allocate_takes_the_first_run_that_holds_all() -> None:
    pages = fragmented(20, [PageRun(1, 2), PageRun(5, 4), PageRun(12, 6)])
    assert allocate(pages, 3) == [PageRun(5, 3)]
    assert pages.free_runs() == [PageRun(1, 2), PageRun(8, 1), PageRun(12, 6)]


def test_allocate_uses_the_fewest_fragments_when_no_run_holds_all() -> None:
    pages = fragmented(20, [PageRun(1, 2), PageRun(5, 4), PageRun(12, 6)])
    assert allocate(pages, 9) == [PageRun(5, 3), PageRun(12, 6)]
    assert pages.num_free == 3


def test_allocate_prefers_the_pages_after_the_owners_last() -> None:
    pages = fragmented(20, [PageRun(1, 3), PageRun(5, 4)])
    assert allocate(pages, 1, after=4) == [PageRun(5, 1)]
    assert allocate(pages, 2, after=5) == [PageRun(6, 2)]
    assert allocate(pages, 2, after=7) == [PageRun(1, 2)], "one page follows, two are wanted"
    assert allocate(pages, 1, after=11) == [PageRun(3, 1)]


def test_finding_pages_takes_none() -> None:
    pages = fragmented(20, [PageRun(1, 2), PageRun(5, 4), PageRun(12, 6)])
    assert [len(pages.find(num)) for num in (1, 6, 7, 10, 11, 12)] == [1, 1, 2, 2, 3, 3]
    assert pages.num_free == 12


def test_freed_neighbours_join() -> None:
    pages = PageAllocator(9)
    allocate(pages, 9)
    joined = [pages.free(PageRun(first, 3)) for first in (0, 6, 3)]
    assert joined == [PageRun(0, 3), PageRun(6, 3), PageRun(0, 9)]
    assert pages.free_runs() == [PageRun(0, 9)]


@pytest.mark.parametrize("run", [PageRun(1, 1), PageRun(0, 2), PageRun(2, 2), PageRun(3, 6)])
def test_double_free_is_an_error(run: PageRun) -> None:
    pages = fragmented(10, [PageRun(1, 2), PageRun(8, 1)])
    with pytest.raises(AssertionError, match="double free"):
        pages.free(run)


def test_free_outside_the_rank_is_an_error() -> None:
    with pytest.raises(AssertionError, match="not a run of this rank"):
        fragmented(4, []).free(PageRun(3, 2))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 40))
def test_allocator_against_a_set_of_pages(data: st.DataObject, num_pages: int) -> None:
    pages, free, held = PageAllocator(num_pages), set(range(num_pages)), []
    for _ in range(data.draw(st.integers(1, 30))):
        if free and data.draw(st.booleans()):
            num = data.draw(st.integers(1, len(free)))
            runs = allocate(pages, num)
            taken = pages_of(runs)
            assert len(taken) == len(set(taken)) == num
            assert set(taken) <= free
            free -= set(taken)
            held.extend(runs)
        elif held:
            run = held.pop(data.draw(st.integers(0, len(held) - 1)))
            pages.free(run)
            free |= set(pages_of((run,)))
        assert pages_of(tuple(pages.free_runs())) == sorted(free)
        assert pages.num_free == len(free)
        for run, after in zip(pages.free_runs(), pages.free_runs()[1:], strict=False):
            assert run.stop < after.first


def test_both_zigzag_runs_of_a_rank_lie_side_by_side() -> None:
    ledger = Ledger(num_ranks=2, pages_per_rank=8, block_size=2)
    extents = ledger.place(7, zigzag(0, 16, 2, 2))
    assert extents == (Extent(0, 0, 2), Extent(1, 0, 4), Extent(0, 2, 2))
    assert ledger.extents(7) == extents
    assert ledger.blocks_by_rank(7) == (4, 4)
    assert ledger.num_blocks(7) == 8
    assert ledger.last_rank(7) == 0
    assert [ledger.used_pages(rank) for rank in (0, 1)] == [4, 4]


def test_append_follows_the_last_page_of_that_rank() -> None:
    ledger = Ledger(2, 8, 2)
    ledger.place(7, (Slice(0, 0, 4),))
    assert ledger.append(7, 0) == Extent(0, 2, 1)
    assert ledger.append(7, 1) == Extent(1, 0, 1)
    assert ledger.append(7, 0) == Extent(0, 3, 1)
    assert ledger.extents(7) == (Extent(0, 0, 3), Extent(1, 0, 1), Extent(0, 3, 1))
    ledger.check_integrity([7])


def test_append_keeps_a_shard_contiguous_though_an_earlier_page_is_free() -> None:
    ledger = Ledger(1, 8, 2)
    ledger.place(1, (Slice(0, 0, 4),))
    ledger.place(2, (Slice(0, 0, 4),))
    ledger.free(1)
    assert ledger.append(2, 0) == Extent(0, 4, 1)
    assert ledger.extents(2) == (Extent(0, 2, 3),)


def test_place_is_all_or_nothing() -> None:
    ledger = Ledger(2, 4, 2)
    ledger.place(1, (Slice(1, 0, 6),))
    slices = zigzag(0, 12, 2, 2)
    assert not ledger.can_place(slices)
    with pytest.raises(AssertionError, match="pages wanted"):
        ledger.place(2, slices)
    assert ledger.free_by_rank() == [4, 1]
    assert not ledger.holds(2)
    ledger.check_integrity([1])


@pytest.mark.parametrize(
    "slices",
    [
        (Slice(0, 2, 4),),
        (Slice(0, 0, 2), Slice(1, 4, 6)),
        (Slice(0, 0, 3), Slice(1, 3, 4)),
    ],
    ids=["not from 0", "gap", "inside a block"],
)
def test_place_refuses_slices_that_do_not_follow_on(slices: tuple[Slice, ...]) -> None:
    with pytest.raises(AssertionError, match="start"):
        Ledger(2, 8, 2).place(1, slices)


def test_place_fills_fragments_in_block_order() -> None:
    ledger = Ledger(1, 6, 1)
    for seq_id in range(6):
        ledger.place(seq_id, (Slice(0, 0, 1),))
    for seq_id in (0, 2, 3, 5):
        ledger.free(seq_id)
    assert ledger.place(9, (Slice(0, 0, 3),)) == (Extent(0, 0, 1), Extent(0, 2, 2))
    ledger.check_integrity([1, 4, 9])


def test_integrity_names_a_dead_owner() -> None:
    ledger = Ledger(1, 4, 2)
    ledger.place(3, (Slice(0, 0, 4),))
    with pytest.raises(AssertionError, match=r"sequences \[3\] ended but still own blocks"):
        ledger.check_integrity([])


def test_integrity_names_a_page_owned_twice() -> None:
    ledger = Ledger(1, 4, 2)
    ledger.place(3, (Slice(0, 0, 4),))
    ledger._pages[0].free(PageRun(1, 1))
    with pytest.raises(AssertionError, match="page 1 of rank 0 is owned by the free runs and seq"):
        ledger.check_integrity([3])


def test_integrity_names_a_lost_page() -> None:
    ledger = Ledger(1, 4, 2)
    allocate(ledger._pages[0], 2)
    with pytest.raises(AssertionError, match=r"rank 0 lost pages \[0, 1\]"):
        ledger.check_integrity([])


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 12), st.integers(1, 4))
def test_ledger_stays_whole_under_random_use(
    data: st.DataObject, num_ranks: int, pages_per_rank: int, block_size: int
) -> None:
    ledger = Ledger(num_ranks, pages_per_rank, block_size)
    blocks: dict[int, int] = {}
    for seq_id in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["place", "append", "free"]))
        if action == "place":
            tokens = data.draw(st.integers(1, num_ranks * pages_per_rank * block_size))
            slices = zigzag(0, tokens, num_ranks, block_size)
            if ledger.can_place(slices):
                ledger.place(seq_id, slices)
                blocks[seq_id] = num_blocks(tokens, block_size)
        elif blocks:
            chosen = data.draw(st.sampled_from(sorted(blocks)))
            if action == "free":
                ledger.free(chosen)
                del blocks[chosen]
            else:
                rank = data.draw(st.integers(0, num_ranks - 1))
                if ledger.free_pages(rank):
                    ledger.append(chosen, rank)
                    blocks[chosen] += 1
        ledger.check_integrity(blocks)
        assert {seq_id: ledger.num_blocks(seq_id) for seq_id in blocks} == blocks
        assert sum(ledger.used_pages(rank) for rank in range(num_ranks)) == sum(blocks.values())
