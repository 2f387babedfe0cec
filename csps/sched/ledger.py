"""Which rank's pages hold which blocks of which sequence.

Ownership. A page is owned by exactly one of: the free runs of its rank's allocator, or one
block of one sequence in the table. A block keeps its page until `free(seq_id)`; nothing
else gives pages back. The ledger decides nothing: placement.py chooses the ranks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from csps.core.shards import Extent, Slice, num_blocks
from csps.sched.pages import PageAllocator, PageRun


@dataclass(slots=True)
class _Table:
    """Blocks of one sequence. `last_page[rank]` is its newest page there, -1 if none."""

    extents: list[Extent]
    blocks_by_rank: list[int]
    last_page: list[int]

    def add(self, extent: Extent) -> None:
        _join(self.extents, extent)
        self.blocks_by_rank[extent.rank] += extent.num_pages
        self.last_page[extent.rank] = extent.first_page + extent.num_pages - 1


class Ledger:
    """KV pages of `num_ranks` ranks, `pages_per_rank` each, `block_size` tokens a page."""

    def __init__(self, num_ranks: int, pages_per_rank: int, block_size: int) -> None:
        self.num_ranks = num_ranks
        self.pages_per_rank = pages_per_rank
        self.block_size = block_size
        self._pages = [PageAllocator(pages_per_rank) for _ in range(num_ranks)]
        self._tables: dict[int, _Table] = {}

    # Pages

    def free_pages(self, rank: int) -> int:
        return self._pages[rank].num_free

    def used_pages(self, rank: int) -> int:
        return self.pages_per_rank - self._pages[rank].num_free

    def free_by_rank(self) -> list[int]:
        """Free pages (index = rank)."""
        return [pages.num_free for pages in self._pages]

    # Sequences

    @property
    def num_sequences(self) -> int:
        """Sequences that hold blocks."""
        return len(self._tables)

    def holds(self, seq_id: int) -> bool:
        return seq_id in self._tables

    def extents(self, seq_id: int) -> tuple[Extent, ...]:
        """Blocks of the sequence in block order, neighbours joined."""
        return tuple(self._tables[seq_id].extents)

    def num_blocks(self, seq_id: int) -> int:
        return sum(self._tables[seq_id].blocks_by_rank)

    def blocks_by_rank(self, seq_id: int) -> tuple[int, ...]:
        """Blocks of the sequence on each rank (index = rank)."""
        return tuple(self._tables[seq_id].blocks_by_rank)

    def last_rank(self, seq_id: int) -> int:
        """Rank of the sequence's last block."""
        return self._tables[seq_id].extents[-1].rank

    # Changes

    def can_place(self, slices: Iterable[Slice]) -> bool:
        """Whether every rank has the pages that `place` would take."""
        return all(
            need <= pages.num_free
            for need, pages in zip(self._need(slices), self._pages, strict=True)
        )

    def place(self, seq_id: int, slices: Sequence[Slice]) -> tuple[Extent, ...]:
        """Give a new sequence the blocks of `slices`, all or (AssertionError) none.

        Slices cover the positions from 0 without a gap, in position order; each starts on
        a block boundary and only the last may end inside a block.
        """
        assert not self.holds(seq_id), f"sequence {seq_id} is placed already"
        need = self._need(slices)
        assert self.can_place(slices), f"{need} pages wanted, {self.free_by_rank()} free"
        # One allocation per rank, so that a rank's two zigzag runs lie side by side.
        runs = [
            list(pages.allocate(num)) if num else []
            for num, pages in zip(need, self._pages, strict=True)
        ]
        table = _Table([], [0] * self.num_ranks, [-1] * self.num_ranks)
        for piece in slices:
            left = num_blocks(piece.num_tokens, self.block_size)
            while left:
                run = runs[piece.rank].pop(0)
                num = min(left, run.num)
                table.add(Extent(piece.rank, run.first, num))
                left -= num
                if num < run.num:
                    runs[piece.rank].insert(0, PageRun(run.first + num, run.num - num))
        self._tables[seq_id] = table
        return tuple(table.extents)

    def append(self, seq_id: int, rank: int) -> Extent:
        """One more block on `rank`, which has a free page; next to its last one if possible."""
        table = self._tables[seq_id]
        run = self._pages[rank].allocate(1, after=table.last_page[rank])[0]
        extent = Extent(rank, run.first, 1)
        table.add(extent)
        return extent

    def free(self, seq_id: int) -> None:
        """Give every page of the sequence back."""
        for extent in self._tables.pop(seq_id).extents:
            self._pages[extent.rank].free(PageRun(extent.first_page, extent.num_pages))

    def check_integrity(self, live_seq_ids: Iterable[int]) -> None:
        """AssertionError if a page is lost, owned twice, or owned by a sequence not live."""
        dead = self._tables.keys() - set(live_seq_ids)
        assert not dead, f"sequences {sorted(dead)} ended but still own blocks"
        owners: list[list[str]] = [[""] * self.pages_per_rank for _ in range(self.num_ranks)]
        for rank, pages in enumerate(self._pages):
            runs = pages.free_runs()
            for run in runs:
                _claim(owners, Extent(rank, run.first, run.num), "the free runs")
            counted = sum(run.num for run in runs)
            assert counted == pages.num_free, (
                f"rank {rank} counts {pages.num_free} free pages, its runs hold {counted}"
            )
        for seq_id, table in self._tables.items():
            held = [0] * self.num_ranks
            for extent in table.extents:
                _claim(owners, extent, f"sequence {seq_id}")
                held[extent.rank] += extent.num_pages
            assert held == table.blocks_by_rank, (
                f"sequence {seq_id} counts {table.blocks_by_rank} blocks, holds {held}"
            )
        for rank, names in enumerate(owners):
            lost = [page for page, owner in enumerate(names) if not owner]
            assert not lost, f"rank {rank} lost pages {lost}"

    def _need(self, slices: Iterable[Slice]) -> list[int]:
        """Pages per rank (index = rank) that the slices take."""
        need = [0] * self.num_ranks
        at = 0
        for piece in slices:
            assert piece.start == at, f"{piece} does not start at {at}"
            assert at % self.block_size == 0, f"{piece} starts inside a block"
            at = piece.stop
            need[piece.rank] += num_blocks(piece.num_tokens, self.block_size)
        return need


def _join(extents: list[Extent], extent: Extent) -> None:
    """Add `extent` at the end, joined with the last one when its pages follow on."""
    if extents:
        last = extents[-1]
        if (last.rank, last.first_page + last.num_pages) == (extent.rank, extent.first_page):
            extents[-1] = last._replace(num_pages=last.num_pages + extent.num_pages)
            return
    extents.append(extent)


def _claim(owners: list[list[str]], extent: Extent, name: str) -> None:
    for page in range(extent.first_page, extent.first_page + extent.num_pages):
        owner = owners[extent.rank][page]
        assert not owner, f"page {page} of rank {extent.rank} is owned by {owner} and {name}"
        owners[extent.rank][page] = name
