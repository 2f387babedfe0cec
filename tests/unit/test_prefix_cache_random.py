"""Ledger with its prefix cache under random use, against pages that remember what they hold."""

from collections.abc import Iterable
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from csps.core.shards import Extent, Slice, num_blocks, zigzag
from csps.sched.ledger import Ledger
from csps.sched.pages import Page
from csps.sched.prefix_cache import NO_PREFIX, Prefix
from tests.unit.prefix_sequences import reader

# A sparse sequence may read exact KV, an exact one nothing else.
SALTS = {"exact": ("exact",), "sparse": ("sparse", "exact")}

# What KV at a position depends on: all tokens up to it, and how each of its blocks was computed.
Kv = tuple[tuple[int, ...], tuple[str, ...]]


@dataclass
class Live:
    """One sequence: its tokens, pages by block, and how each block was (or will be) computed."""

    tokens: list[int]
    salt: str
    pages: list[Page]
    methods: list[str]
    num_computed: int
    num_published: int


class CacheMachine(RuleBasedStateMachine):
    @initialize(
        num_ranks=st.integers(1, 3),
        pages_per_rank=st.integers(2, 10),
        block_size=st.integers(1, 3),
        prefix_cache=st.sampled_from([True, True, True, False]),
    )
    def build(
        self, num_ranks: int, pages_per_rank: int, block_size: int, prefix_cache: bool
    ) -> None:
        self.ledger = Ledger(num_ranks, pages_per_rank, block_size, prefix_cache)
        self.caches = prefix_cache
        self.block_size = block_size
        self.live: dict[int, Live] = {}
        self.kv: dict[tuple[Page, int], Kv] = {}  # by page and place in it
        self.next_id = 0

    # Two tokens and short lengths, so that prefixes are often shared.
    @rule(
        head=st.integers(0, 1),
        num_head=st.integers(1, 12),
        tail=st.lists(st.integers(0, 1), max_size=4),
        salt=st.sampled_from(sorted(SALTS)),
        rank=st.integers(0, 2),
        split=st.booleans(),
        uses_cache=st.sampled_from([True, True, True, False]),
    )
    def place(
        self,
        head: int,
        num_head: int,
        tail: list[int],
        salt: str,
        rank: int,
        split: bool,
        uses_cache: bool,
    ) -> None:
        ledger, size = self.ledger, self.block_size
        tokens = [head] * num_head + tail
        prefix = self.match(tokens, salt) if uses_cache else NO_PREFIX
        start = prefix.num_tokens
        slices = (Slice(rank % ledger.num_ranks, start, len(tokens)),)
        if split:
            slices = zigzag(start, len(tokens), ledger.num_ranks, size)
        pinned = self.held_pages() | {block.page for block in prefix.blocks}
        fits = all(
            sum(num_blocks(piece.num_tokens, size) for piece in slices if piece.rank == rank)
            <= ledger.pages_per_rank - sum(page.rank == rank for page in pinned)
            for rank in range(ledger.num_ranks)
        )
        assert ledger.can_place(slices, prefix) == fits
        if not fits:
            return
        read = [block.page for block in prefix.blocks]
        methods = [self.kv[page, 0][1][-1] for page in read]
        pages = pages_of(ledger.place(self.next_id, slices, prefix))
        assert pages[: len(read)] == read
        ranks = [piece.rank for piece in slices for _ in range(num_blocks(piece.num_tokens, size))]
        assert [page.rank for page in pages[len(read) :]] == ranks
        self.hand_out(pages[len(read) :])
        methods += [salt] * (len(pages) - len(read))
        self.live[self.next_id] = Live(tokens, salt, pages, methods, start, start)
        self.next_id += 1

    def match(self, tokens: list[int], salt: str) -> Prefix:
        """The prefix the ledger finds, checked against what its pages hold."""
        ledger, size = self.ledger, self.block_size
        prefix = ledger.match(reader(tokens), len(tokens), SALTS[salt])
        assert prefix.num_tokens == len(prefix.blocks) * size < len(tokens)
        methods: tuple[str, ...] = ()
        for index, block in enumerate(prefix.blocks):
            for at in range(size):
                position = index * size + at
                held, how = self.kv[block.page, at]
                assert held == tuple(tokens[: position + 1])
                assert how[:-1] == methods
                assert set(how) <= set(SALTS[salt])
            methods = how
        for live in self.live.values():
            shared = common(live, tokens, size)
            if self.caches and set(live.methods[:shared]) <= set(SALTS[salt]):
                assert len(prefix.blocks) >= shared, "a block that is read was not found"
        return prefix

    @precondition(lambda self: getattr(self, "live", None))
    @rule(
        pick=st.integers(0, 20),
        num=st.one_of(st.integers(1, 12), st.just(100)),
        publish=st.sampled_from([True, True, False]),
    )
    def compute(self, pick: int, num: int, publish: bool) -> None:
        """Write KV of the next tokens, and publish it now or with a later step's."""
        seq_id, live = self.pick(pick)
        tokens, size = live.tokens, self.block_size
        stop = min(live.num_computed + num, len(tokens))
        for position in range(live.num_computed, stop):
            block, at = divmod(position, size)
            self.kv[live.pages[block], at] = expected(live, position, size)
        live.num_computed = stop
        if publish:
            self.ledger.publish(seq_id, reader(tokens), stop, live.salt)
            live.num_published = stop // size * size

    @precondition(lambda self: getattr(self, "live", None))
    @rule(pick=st.integers(0, 20), token=st.integers(0, 1), rank=st.integers(0, 2))
    def decode(self, pick: int, token: int, rank: int) -> None:
        """One more token, in a new block where the last is full."""
        seq_id, live = self.pick(pick)
        if len(live.tokens) == len(live.pages) * self.block_size:
            rank %= self.ledger.num_ranks
            if not self.ledger.free_pages(rank):
                return
            pages = pages_of([self.ledger.append(seq_id, rank)])
            assert [page.rank for page in pages] == [rank]
            self.hand_out(pages)
            live.pages += pages
            live.methods.append(live.salt)
        live.tokens.append(token)

    @precondition(lambda self: getattr(self, "live", None))
    @rule(pick=st.integers(0, 20))
    def end(self, pick: int) -> None:
        seq_id, _ = self.pick(pick)
        self.ledger.free(seq_id)
        del self.live[seq_id]

    def pick(self, at: int) -> tuple[int, Live]:
        seq_id = sorted(self.live)[at % len(self.live)]
        return seq_id, self.live[seq_id]

    def hand_out(self, pages: list[Page]) -> None:
        assert len(set(pages)) == len(pages)
        assert not set(pages) & self.held_pages(), "a page that a live sequence reads was reused"
        for page in pages:
            for at in range(self.block_size):
                self.kv.pop((page, at), None)

    def held_pages(self) -> set[Page]:
        return {page for live in self.live.values() for page in live.pages}

    @invariant()
    def ledger_agrees(self) -> None:
        if not hasattr(self, "ledger"):
            return
        ledger = self.ledger
        ledger.check_integrity(self.live)
        used = [0] * ledger.num_ranks
        for page in self.held_pages():
            used[page.rank] += 1
        assert [ledger.used_pages(rank) for rank in range(ledger.num_ranks)] == used
        assert ledger.free_by_rank() == [ledger.pages_per_rank - num for num in used]
        for seq_id, live in self.live.items():
            assert pages_of(ledger.extents(seq_id)) == live.pages
            for position in range(live.num_computed):
                block, at = divmod(position, self.block_size)
                want = expected(live, position, self.block_size)
                assert self.kv[live.pages[block], at] == want
        if not self.caches:
            assert ledger.cache_stats == (0, 0, 0, 0)

    def teardown(self) -> None:
        """Every page can be had in the end, whatever is cached."""
        if not hasattr(self, "ledger"):
            return
        for seq_id in self.live:
            self.ledger.free(seq_id)
        ledger = self.ledger
        every = tuple(
            Slice(rank, rank * size, (rank + 1) * size)
            for size in [ledger.pages_per_rank * self.block_size]
            for rank in range(ledger.num_ranks)
        )
        extents = ledger.place(self.next_id, every)
        assert extents == tuple(
            Extent(rank, 0, ledger.pages_per_rank) for rank in range(ledger.num_ranks)
        )
        assert ledger.cache_stats.num_blocks == 0
        ledger.check_integrity([self.next_id])


def expected(live: Live, position: int, block_size: int) -> Kv:
    methods = live.methods[: position // block_size + 1]
    return tuple(live.tokens[: position + 1]), tuple(methods)


def common(live: Live, tokens: list[int], block_size: int) -> int:
    """Blocks that a live sequence has published and another of `tokens` begins with."""
    most = min(live.num_published, len(tokens) - 1) // block_size
    return max(
        num
        for num in range(most + 1)
        if live.tokens[: num * block_size] == tokens[: num * block_size]
    )


def pages_of(extents: Iterable[Extent]) -> list[Page]:
    return [Page(rank, page) for rank, first, num in extents for page in range(first, first + num)]


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
