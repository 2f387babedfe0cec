"""Which rank's pages hold which blocks of which sequence.

Ownership. A page is owned by exactly one of:
- the free runs of its rank's allocator;
- one sequence: a block that is not published (yet). `publish` hands it to the cache,
  `free` to the free runs;
- the prefix cache: a published block, which any number of live sequences read. A reader
  keeps its page until `free(seq_id)`. A page that nobody reads stays the cache's until the
  ledger takes it for another block, and counts as free until then.
The ledger decides nothing: placement.py chooses the ranks, prefix_cache.py what is evicted.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from csps.core.shards import Extent, Slice, num_blocks
from csps.sched.pages import Page, PageAllocator, PageRun
from csps.sched.prefix_cache import NO_PREFIX, CachedBlock, Prefix, PrefixCache, TokenIds
from csps.sched.table import Table

# Runs per rank that a placement accepts before it evicts for a longer one: attention reads a
# shard of few runs in place.
_MAX_RUNS = 2

# Least part of a rank's pages evicted at a time, so that blocks appended one by one find a run.
_EVICT_PART = 256


class CacheStats(NamedTuple):
    """The prefix cache: blocks in it now; since the start: blocks evicted, tokens of placed
    sequences (`query_tokens`) and those of them that were cached (`hit_tokens`)."""

    num_blocks: int
    num_evictions: int
    hit_tokens: int
    query_tokens: int


class Ledger:
    """KV pages of `num_ranks` ranks, `pages_per_rank` each, `block_size` tokens a page."""

    def __init__(
        self, num_ranks: int, pages_per_rank: int, block_size: int, prefix_cache: bool = True
    ) -> None:
        """Without `prefix_cache` nothing is hashed, matched or kept."""
        self.num_ranks = num_ranks
        self.pages_per_rank = pages_per_rank
        self.block_size = block_size
        self._pages = [PageAllocator(pages_per_rank) for _ in range(num_ranks)]
        self._tables: dict[int, Table] = {}
        self._cache = PrefixCache(num_ranks, block_size)
        self._caches = prefix_cache
        self.num_published = 0  # blocks, since the start
        self._hit_tokens = 0
        self._query_tokens = 0

    # Pages

    def free_pages(self, rank: int) -> int:
        """Pages that can be had: free ones, and cached ones that nobody reads."""
        return self._pages[rank].num_free + self._cache.num_idle(rank)

    def used_pages(self, rank: int) -> int:
        """Pages that live sequences hold; a shared page counts once."""
        return self.pages_per_rank - self.free_pages(rank)

    def used_by_rank(self) -> tuple[int, ...]:
        """`used_pages` of every rank."""
        return tuple([self.used_pages(rank) for rank in range(self.num_ranks)])

    def free_by_rank(self, prefix: Prefix = NO_PREFIX) -> list[int]:
        """Pages that can be had (index = rank) by a sequence that begins with `prefix`."""
        free = [self.free_pages(rank) for rank in range(self.num_ranks)]
        for block in prefix.blocks:
            if block.idle:
                free[block.page.rank] -= 1
        return free

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
        return self._tables[seq_id].num_blocks

    def is_full(self, seq_id: int, num_tokens: int) -> bool:
        """Whether `num_tokens` tokens fill the sequence's blocks."""
        return num_tokens == self._tables[seq_id].num_blocks * self.block_size

    def blocks_by_rank(self, seq_id: int) -> tuple[int, ...]:
        """Blocks of the sequence on each rank (index = rank)."""
        return tuple(self._tables[seq_id].blocks_by_rank)

    def last_rank(self, seq_id: int) -> int:
        """Rank of the sequence's last block."""
        return self._tables[seq_id].extents[-1].rank

    # Prefixes

    def match(self, token_ids: TokenIds, num_tokens: int, salts: Sequence[str]) -> Prefix:
        """The longest cached prefix of a sequence of `num_tokens` tokens, the last left out.

        Every block of it was published under one of `salts`, preferred first. Costs some
        microseconds per matched block and changes nothing.
        """
        if not self._caches:
            return NO_PREFIX
        return self._cache.match(token_ids, num_tokens, salts)

    def prefix_by_rank(self, prefix: Prefix) -> list[int]:
        """Blocks of `prefix` on each rank (index = rank)."""
        blocks = Counter(block.page.rank for block in prefix.blocks)
        return [blocks[rank] for rank in range(self.num_ranks)]

    def publish(self, seq_id: int, token_ids: TokenIds, num_computed: int, salt: str) -> None:
        """Let later sequences read the full blocks of the first `num_computed` tokens.

        Their KV is in the pages: no step in flight writes it. `salt` says how it was computed.
        Costs time for the blocks not published before.
        """
        table = self._tables[seq_id]
        first, stop = len(table.cached), num_computed // self.block_size
        if not self._caches or first >= stop:
            return
        parent = table.cached[-1] if table.cached else None
        for index, page in enumerate(table.own_pages(stop - first), first):
            start = index * self.block_size
            ids = token_ids(start, start + self.block_size)
            parent, unread = self._cache.add(parent, ids, salt, page)
            self.num_published += 1
            table.cached.append(parent)
            if unread is not None:
                self._free(unread)

    @property
    def cache_stats(self) -> CacheStats:
        cache = self._cache
        return CacheStats(
            cache.num_blocks, cache.num_evictions, self._hit_tokens, self._query_tokens
        )

    # Changes

    def can_place(self, slices: Iterable[Slice], prefix: Prefix = NO_PREFIX) -> bool:
        """Whether every rank has the pages that `place` would take."""
        need = self.need(slices, prefix.num_tokens)
        return all(num <= free for num, free in zip(need, self.free_by_rank(prefix), strict=True))

    def place(
        self, seq_id: int, slices: Sequence[Slice], prefix: Prefix = NO_PREFIX
    ) -> tuple[Extent, ...]:
        """Give a new sequence the blocks of `prefix`, then those of `slices`; its extents.

        All or (AssertionError) none. Slices cover the positions from the prefix's end without
        a gap, in position order; each starts on a block boundary and only the last may end
        inside a block. No other change came between `match` and this.
        """
        assert not self.holds(seq_id), f"sequence {seq_id} is placed already"
        assert all(block.pages for block in prefix.blocks), "the prefix was evicted"
        need = self.need(slices, prefix.num_tokens)
        assert self.can_place(slices, prefix), (
            f"{need} pages wanted, {self.free_by_rank(prefix)} free"
        )
        table = Table(self.num_ranks)
        table.cached.extend(prefix.blocks)
        # Before any page is taken, so that none of these is evicted for it.
        for block in prefix.blocks:
            rank, page = self._cache.read(block)
            table.add(Extent(rank, page, 1))
        # One allocation per rank, so that a rank's two zigzag runs lie side by side.
        runs = [
            self._take(rank, num, table.last_page[rank]) if num else []
            for rank, num in enumerate(need)
        ]
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
        if self._caches:
            self._hit_tokens += prefix.num_tokens
            self._query_tokens += slices[-1].stop
        return tuple(table.extents)

    def append(self, seq_id: int, rank: int) -> Extent:
        """One more block on `rank`, which has a free page; next to its last one if possible."""
        table = self._tables[seq_id]
        extent = Extent(rank, self._take(rank, 1, table.last_page[rank])[0].first, 1)
        table.add(extent)
        return extent

    def free(self, seq_id: int) -> None:
        """End the sequence: its own pages are free, the cache's have one reader less."""
        table = self._tables.pop(seq_id)
        for extent in table.own_extents():
            self._pages[extent.rank].free(PageRun(extent.first_page, extent.num_pages))
        # Last one first, the order in which they will be evicted.
        for block, page in reversed(table.cached_pages()):
            if self._cache.release(block, page):
                self._free(page)

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
        readers: Counter[tuple[CachedBlock, Page]] = Counter()
        for seq_id, table in self._tables.items():
            held = [0] * self.num_ranks
            for extent in table.extents:
                held[extent.rank] += extent.num_pages
            assert held == table.blocks_by_rank, (
                f"sequence {seq_id} counts {table.blocks_by_rank} blocks, holds {held}"
            )
            assert sum(held) == table.num_blocks, f"sequence {seq_id} miscounts its blocks"
            for extent in table.own_extents():
                _claim(owners, extent, f"sequence {seq_id}")
            readers.update(table.cached_pages())
        for rank, page in self._cache.pages():
            _claim(owners, Extent(rank, page, 1), "the cache")
        self._cache.check_integrity(readers)
        for rank, names in enumerate(owners):
            lost = [page for page, owner in enumerate(names) if not owner]
            assert not lost, f"rank {rank} lost pages {lost}"

    def need(self, slices: Iterable[Slice], start: int) -> list[int]:
        """Pages per rank (index = rank) that the slices take, which begin at `start`."""
        need = [0] * self.num_ranks
        at = start
        for piece in slices:
            assert piece.start == at, f"{piece} does not start at {at}"
            assert at % self.block_size == 0, f"{piece} starts inside a block"
            at = piece.stop
            need[piece.rank] += num_blocks(piece.num_tokens, self.block_size)
        return need

    def _take(self, rank: int, num: int, after: int) -> list[PageRun]:
        """Take `num` pages for the owner of page `after` (-1 if none).

        Evicts nothing while enough pages are free, in few runs. Else it evicts until they lie
        in one run, but no more than would make a run by themselves.
        """
        pages = self._pages[rank]
        runs = pages.find(num, after) if pages.num_free >= num else []
        if not runs or len(runs) > _MAX_RUNS:
            goal = max(num, self.pages_per_rank // _EVICT_PART)
            evicted = longest = 0
            while self._cache.num_idle(rank) and (
                pages.num_free < num or max(evicted, longest) < goal
            ):
                for page in self._cache.evict(rank):
                    run = self._free(page)
                    if page.rank == rank:
                        evicted += 1
                        longest = max(longest, run.num)
            runs = pages.find(num, after)
        pages.take(runs)
        return runs

    def _free(self, page: Page) -> PageRun:
        return self._pages[page.rank].free(PageRun(page.number, 1))


def _claim(owners: list[list[str]], extent: Extent, name: str) -> None:
    for page in range(extent.first_page, extent.first_page + extent.num_pages):
        owner = owners[extent.rank][page]
        assert not owner, f"page {page} of rank {extent.rank} is owned by {owner} and {name}"
        owners[extent.rank][page] = name
