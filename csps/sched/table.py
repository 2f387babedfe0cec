"""Blocks of one sequence, and which of them the prefix cache owns."""

from collections.abc import Iterable, Iterator
from itertools import islice

from csps.core.shards import Extent
from csps.sched.pages import Page
from csps.sched.prefix_cache import CachedBlock


class Table:
    """Blocks in block order. The first len(cached) are the cache's, the others its own."""

    def __init__(self, num_ranks: int) -> None:
        self.extents: list[Extent] = []  # neighbours joined
        self.num_blocks = 0
        self.blocks_by_rank = [0] * num_ranks
        self.last_page = [-1] * num_ranks  # newest page on each rank, -1 if none
        self.cached: list[CachedBlock] = []

    def add(self, extent: Extent) -> None:
        """Blocks at the end, joined with the last ones where their pages follow on."""
        rank, first_page, num_pages = extent
        self.num_blocks += num_pages
        self.blocks_by_rank[rank] += num_pages
        self.last_page[rank] = first_page + num_pages - 1
        if self.extents:
            last = self.extents[-1]
            if (last.rank, last.first_page + last.num_pages) == (rank, first_page):
                self.extents[-1] = Extent(rank, last.first_page, last.num_pages + num_pages)
                return
        self.extents.append(extent)

    def cached_pages(self) -> list[tuple[CachedBlock, Page]]:
        """The cache's blocks, each with the page that this sequence reads it at."""
        return list(zip(self.cached, pages_of(self.extents), strict=False))

    def own_extents(self) -> list[Extent]:
        """Blocks that are this sequence's alone."""
        own: list[Extent] = []
        left = self.num_blocks - len(self.cached)
        for rank, first_page, num_pages in reversed(self.extents):  # mostly the last one alone
            if not left:
                break
            num = min(left, num_pages)
            own.append(Extent(rank, first_page + num_pages - num, num))
            left -= num
        return own[::-1]

    def own_pages(self, num: int) -> list[Page]:
        """Pages of the first `num` blocks that are this sequence's alone."""
        return list(islice(pages_of(self.own_extents()), num))


def pages_of(extents: Iterable[Extent]) -> Iterator[Page]:
    for rank, first_page, num_pages in extents:
        for number in range(first_page, first_page + num_pages):
            yield Page(rank, number)
