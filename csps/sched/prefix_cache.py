"""Which blocks of KV can be read by a later sequence that begins with the same tokens.

A block's key is the cached block before it, its token ids and a salt. So it names all tokens
up to its end and, by the salts, how the KV of each block on the way was computed. Salts stand
in every key, not only at the root, so that a sequence may go on under its own salt from blocks
that another salt left (a sparse prefill from exact KV, never the reverse).

Ownership. A page of a cached block belongs to the cache for as long as the block is in it.
`CachedBlock.pages` counts the sequences that read each page; a block has several pages when
several sequences computed it before it was cached, and loses those that nobody reads, down
to one. A block that no sequence reads is *idle*: it may be evicted. Whoever reads a block
reads its parent too, so what follows an idle block is idle, and no chain loses its middle.
The cache decides which pages go; taking and freeing them is the ledger's.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from csps.sched.pages import Page

# Token ids at positions [start, stop) of a sequence, of type code I.
TokenIds = Callable[[int, int], "array[int]"]

# What a block holds: the block before it, its token ids, its salt. It is found by this, so two
# blocks never have the same.
Key = tuple["CachedBlock | None", bytes, str]


@dataclass(slots=True, eq=False, repr=False)
class CachedBlock:
    """A full block in the cache; `pages` is empty once it was evicted."""

    parent: "CachedBlock | None"
    key: Key
    pages: dict[Page, int]  # copies, and how many live sequences read each
    children: dict["CachedBlock", None] = field(default_factory=dict)

    @property
    def page(self) -> Page:
        """The page that a new reader reads."""
        return next(iter(self.pages))

    @property
    def idle(self) -> bool:
        return not any(self.pages.values())


class Prefix(NamedTuple):
    """Cached blocks that a sequence begins with. Valid until the ledger next changes."""

    blocks: tuple[CachedBlock, ...]
    num_tokens: int


NO_PREFIX = Prefix((), 0)


class PrefixCache:
    """Blocks of `block_size` tokens on `num_ranks` ranks, by content."""

    def __init__(self, num_ranks: int, block_size: int) -> None:
        self.num_evictions = 0
        self._block_size = block_size
        self._blocks: dict[Key, CachedBlock] = {}
        # By rank, least recently released first. A block is released after what follows it.
        self._idle: list[OrderedDict[CachedBlock, None]] = [OrderedDict() for _ in range(num_ranks)]

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def num_idle(self, rank: int) -> int:
        return len(self._idle[rank])

    def match(self, token_ids: TokenIds, num_tokens: int, salts: Sequence[str]) -> Prefix:
        """The longest cached prefix of a sequence whose blocks all have one of `salts`.

        Of prefixes of one length, the one that prefers earlier salts, first blocks first. At
        most (num_tokens - 1) // block_size blocks: the next token is drawn from the last one's
        hidden state, so that one must be computed. Changes nothing.
        """
        size = self._block_size
        longest: list[CachedBlock | None] = [None]
        for start in range(0, num_tokens - size, size):
            packed = token_ids(start, start + size).tobytes()
            keys = [(parent, packed, salt) for parent in longest for salt in salts]
            found = [block for key in keys if (block := self._blocks.get(key)) is not None]
            if not found:
                break
            longest = [*found]
        blocks: list[CachedBlock] = []
        block = longest[0]
        while block is not None:
            blocks.append(block)
            block = block.parent
        return Prefix(tuple(reversed(blocks)), len(blocks) * size)

    def read(self, block: CachedBlock) -> Page:
        """Count a sequence in as a reader of `block`; the page it reads."""
        page = block.page
        if block.idle:
            del self._idle[page.rank][block]
        block.pages[page] += 1
        return page

    def add(
        self, parent: CachedBlock | None, token_ids: "array[int]", salt: str, page: Page
    ) -> tuple[CachedBlock, Page | None]:
        """Cache a block that one sequence, which reads `parent` too, computed in `page`.

        Where the block is cached already, `page` is a copy; a page to free is returned with
        the block if the copy replaces one that nobody reads.
        """
        key = (parent, token_ids.tobytes(), salt)
        block = self._blocks.get(key)
        if block is None:
            block = CachedBlock(parent, key, {page: 1})
            self._blocks[key] = block
            if parent is not None:
                parent.children[block] = None
            return block, None
        unread = None
        if block.idle:
            unread, _ = block.pages.popitem()
            del self._idle[unread.rank][block]
        block.pages[page] = 1
        return block, unread

    def release(self, block: CachedBlock, page: Page) -> bool:
        """Count out a reader of `block` at `page`; whether `page` is to be freed.

        A sequence releases its blocks last one first.
        """
        block.pages[page] -= 1
        if block.pages[page]:
            return False
        if len(block.pages) > 1:
            del block.pages[page]
            return True
        self._idle[page.rank][block] = None
        return False

    def evict(self, rank: int) -> list[Page]:
        """Forget the idle block on `rank` that was released first, and all that follow it.

        Those were released no later than it. Returns all their pages, some of other ranks.
        """
        first = next(iter(self._idle[rank]))
        if first.parent is not None:
            del first.parent.children[first]
        freed = []
        left = [first]
        while left:
            block = left.pop()
            left.extend(block.children)
            block.children.clear()
            page, _ = block.pages.popitem()
            del self._idle[page.rank][block]
            del self._blocks[block.key]
            freed.append(page)
        self.num_evictions += len(freed)
        return freed

    def pages(self) -> Iterable[Page]:
        """Every page the cache owns."""
        return (page for block in self._blocks.values() for page in block.pages)

    def check_integrity(self, readers: Mapping[tuple[CachedBlock, Page], int]) -> None:
        """AssertionError unless blocks, readers and idle blocks agree.

        `readers`: how many live sequences read a block at a page, where any does.
        """
        counted = {
            (block, page): num
            for block in self._blocks.values()
            for page, num in block.pages.items()
            if num
        }
        assert counted == readers, "the cache miscounts the readers of a page"
        idle = [0] * len(self._idle)
        for key, block in self._blocks.items():
            assert key == block.key, "a block is cached under another's key"
            parent = block.parent
            if parent is not None:
                assert self._blocks.get(parent.key) is parent, "a cached block's parent is not"
                assert block in parent.children, "a block is not among its parent's children"
            for child in block.children:
                assert self._blocks.get(child.key) is child, "a cached block's child is not"
                assert child.parent is block, "a block is another's child"
                assert child.idle or not block.idle, "a block is read but its parent is not"
            if block.idle:
                (page,) = block.pages
                assert block in self._idle[page.rank], f"rank {page.rank} cannot evict a block"
                idle[page.rank] += 1
            else:
                assert all(block.pages.values()), "a block keeps a copy that nobody reads"
        assert idle == [len(blocks) for blocks in self._idle], "a block read can be evicted"
