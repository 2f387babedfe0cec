"""Bytes that a layer moves between ranks, by formula; docs/strategies.md derives them."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from csps.core.heads import all_heads
from csps.core.model_config import ModelConfig
from csps.core.plan import Work
from csps.core.shards import Extent


@dataclass(frozen=True, slots=True)
class Volumes:
    """Bytes of one layer, all ranks together; `num_tokens` is of a prompt, or 1 when decoding.

    There are at most as many ranks as KV heads, or each rank's copy of k and v would count besides.
    """

    config: ModelConfig
    num_ranks: int
    element_bytes: int

    @property
    def query(self) -> int:
        return self.config.num_heads * self.config.head_dim * self.element_bytes

    @property
    def kv(self) -> int:
        return 2 * self.config.num_kv_heads * self.config.head_dim * self.element_bytes

    def ring(self, num_tokens: int) -> int:
        """Every shard to every other rank: (P - 1) S k."""
        return (self.num_ranks - 1) * num_tokens * self.kv

    @property
    def shipped(self) -> int:
        """A query there, (o, lse) back: 2 q + 4 Hq."""
        return 2 * self.query + 4 * self.config.num_heads

    def ship(self, num_tokens: int) -> int:
        """Queries to all other ranks: (P - 1)(2 q + 4 Hq) per token."""
        return (self.num_ranks - 1) * num_tokens * self.shipped

    def all_reduces(self, num_tokens: int) -> int:
        """Two, of 2 (P - 1)/P E e per rank and token."""
        hidden = self.config.hidden_size * self.element_bytes
        return 4 * (self.num_ranks - 1) * num_tokens * hidden

    def ulysses(self, num_tokens: int) -> int:
        """All-to-all of q, k, v and one of o: f (S/P)(2 q + k) per rank, if heads are even.

        Whatever they are: each rank's rows times the others' heads.
        """
        size, config = self.num_ranks, self.config
        parts = all_heads(config.num_heads, config.num_kv_heads).split(size)
        head = config.head_dim * self.element_bytes
        weights = [2 * (part.num_heads + part.num_kv_heads) * head for part in parts]
        bounds = [rank * num_tokens // size for rank in range(size + 1)]
        return sum(
            (stop - start) * (sum(weights) - own)
            for (start, stop), own in zip(pairwise(bounds), weights, strict=True)
        )

    def helix(self, num_tokens: int) -> int:
        """q, k, v of everyone's heads to all; (o, lse) to the heads' ranks; two all-reduces."""
        others = (self.num_ranks - 1) * num_tokens
        attention = others * (2 * self.query + self.kv + 4 * self.config.num_heads)
        return attention + self.all_reduces(num_tokens)

    def logits(self) -> int:
        """Of one sampled row, in all: parts of the vocabulary in fp32 to one rank."""
        return (self.num_ranks - 1) * -(-self.config.vocab_size // self.num_ranks) * 4

    def exact_prefill(self, work: Work, extents: Iterable[Extent], block_size: int) -> int:
        """Of exact attention for one sequence's part of a prefill step: `ring` or queries shipped
        to the ranks that hold keys before them, whichever is less. `extents`: all its blocks.
        """
        extents = tuple(extents)
        held = _held(extents, block_size, work.stop)
        if len(held) == 1:
            return 0
        shipped = sum(
            piece.num_tokens * len(_held(extents, block_size, piece.start) - {piece.rank})
            for piece in work.slices
        )
        return min(self.ring(work.stop), shipped * self.shipped)


def _held(extents: Iterable[Extent], block_size: int, num_tokens: int) -> set[int]:
    """Ranks that hold any of a sequence's first `num_tokens` tokens."""
    ranks = set()
    first = 0
    for extent in extents:
        if first < num_tokens:
            ranks.add(extent.rank)
        first += extent.num_pages * block_size
    return ranks
