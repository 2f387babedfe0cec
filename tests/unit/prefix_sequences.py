"""Sequences that run against a ledger's prefix cache alone, without a scheduler."""

from array import array
from collections.abc import Sequence

from csps.core.shards import Extent, Slice
from csps.sched.ledger import Ledger
from csps.sched.prefix_cache import NO_PREFIX, Prefix, TokenIds

EXACT, SPARSE = "exact", "csa 0.95"


def reader(tokens: Sequence[int]) -> TokenIds:
    return lambda start, stop: array("I", tokens[start:stop])


def match(ledger: Ledger, tokens: Sequence[int], *salts: str) -> Prefix:
    return ledger.match(reader(tokens), len(tokens), salts or (EXACT,))


def run(
    ledger: Ledger,
    seq_id: int,
    tokens: Sequence[int],
    salt: str = EXACT,
    prefix: Prefix = NO_PREFIX,
    ranks: Sequence[int] = (0,),
) -> tuple[Extent, ...]:
    """Place a sequence behind `prefix`, compute it all and publish it.

    Its new blocks go to `ranks`, in turn if there are several.
    """
    ends = range(prefix.num_tokens, len(tokens), ledger.block_size)
    slices = [
        Slice(ranks[at % len(ranks)], start, min(start + ledger.block_size, len(tokens)))
        for at, start in enumerate(ends)
    ]
    extents = ledger.place(seq_id, slices, prefix)
    ledger.publish(seq_id, reader(tokens), len(tokens), salt)
    return extents


def ended(ledger: Ledger, seq_id: int, tokens: Sequence[int], ranks: Sequence[int] = (0,)) -> None:
    """A sequence that leaves its full blocks in the cache."""
    run(ledger, seq_id, tokens, ranks=ranks)
    ledger.free(seq_id)
