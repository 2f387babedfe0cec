"""What attention knows of a batch: which rows are whose, and which keys lie where.

A rank's *shard* of a sequence is the tokens it holds, in position order. In its pool a
shard is one or more *runs* of consecutive slots (see csps.engine.kv_pool).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from csps.core.attention import AttentionParams


class Run(NamedTuple):
    """Consecutive pool slots [first_slot, first_slot + num_tokens)."""

    first_slot: int
    num_tokens: int


def page_lists(
    shards: Sequence[tuple[Run, ...]], page_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(starts [N + 1], pages, lengths [N]), int64: row i has pages[starts[i] : starts[i + 1]]."""
    runs = np.array([run for shard in shards for run in shard], dtype=np.int64).reshape(-1, 2)
    first_slots, num_tokens = runs.T
    assert not (first_slots % page_size).any(), "a run begins inside a page"
    num_pages = -(-num_tokens // page_size)
    # Runs and pages before each row, tokens before each run.
    run_starts = np.cumsum([0, *map(len, shards)])
    page_starts, token_starts = (np.append(0, np.cumsum(x)) for x in (num_pages, num_tokens))
    within = np.arange(page_starts[-1]) - np.repeat(page_starts[:-1], num_pages)
    pages = np.repeat(first_slots // page_size, num_pages) + within
    return page_starts[run_starts], pages, np.diff(token_starts[run_starts])


class QueryRun(NamedTuple):
    """Consecutive positions computed here, as rows [row, row + num_tokens) of the batch.

    `visible[s]`: leading tokens of rank s's shard that all of these rows see. On this rank
    the run's own keys follow right behind them.
    """

    row: int
    num_tokens: int
    visible: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefillSequence:
    """One sequence of a prefill step as one rank sees it; every rank has it in its batch.

    `queries`: runs of this rank; `queries_by_rank[r]`: of rank r, whose rows are its own.
    `shard_tokens[s]`: tokens of rank s's shard once this step's are written. `runs`: those of
    this rank.
    """

    queries: tuple[QueryRun, ...]
    queries_by_rank: tuple[tuple[QueryRun, ...], ...]
    shard_tokens: tuple[int, ...]
    runs: tuple[Run, ...]

    @property
    def spans_ranks(self) -> bool:
        return sum(tokens > 0 for tokens in self.shard_tokens) > 1


@dataclass(frozen=True, slots=True)
class SparseSequence:
    """One sequence of a prefill step that attends sparsely; every rank has it in its batch.

    A *tile* is the queries of one block's positions. Tiles and blocks are named by the block's
    index in the sequence, int64, ascending. `tiles[r]`: those rank r computes in this step;
    `blocks[r]`: those it holds once they are written; `pages`: pool pages of this rank's
    blocks. This rank's tiles are the batch's rows from `first_row` on. `num_tokens`: the
    sequence's tokens with KV after the step; only its last block may be partly filled.
    `last_tile`: the one that ends the prompt, -1 if a later step computes it.
    """

    seq_id: int
    params: AttentionParams
    block_size: int
    num_tokens: int
    first_row: int
    last_tile: int
    tiles: tuple[np.ndarray, ...]
    blocks: tuple[np.ndarray, ...]
    pages: np.ndarray

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // self.block_size)

    def tile_rows(self, tile: int) -> int:
        """Queries of a tile."""
        return min(self.block_size, self.num_tokens - tile * self.block_size)


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """`slots_T`: int64 pool slot of each row's K and V."""

    sequences: tuple[PrefillSequence, ...]
    sparse: tuple[SparseSequence, ...]
    slots_T: Tensor


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """One decode step as one rank (the master of `shards`' rows) sees it.

    Row i of the batch is one token; `shards[i]` its sequence's keys on this rank, the
    row's own included. `shipped[p]`: rows whose queries go to rank p, which holds some of
    their KV, int64 on the host. `answered[p]`: shards here that rank p's queries want, in p's
    row order.
    """

    shards: tuple[tuple[Run, ...], ...]
    slots_T: Tensor
    shipped: dict[int, np.ndarray]
    answered: dict[int, tuple[tuple[Run, ...], ...]]


class HeadsSequence(NamedTuple):
    """One sequence of a step whose KV is sharded by head: all its blocks are here.

    Its new tokens are rows [row, row + num_tokens) of the batch. `runs`: keys before them, none
    at the start of a sequence; those of a single new token include its own.
    """

    row: int
    num_tokens: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class HeadsBatch:
    """`slots_T`: int64 pool slot of each row's K and V."""

    sequences: tuple[HeadsSequence, ...]
    slots_T: Tensor


@dataclass(frozen=True, slots=True)
class HelixBatch:
    """One decode step of which every rank has all `num_rows` rows.

    `held[p]`: rows whose sequences have KV on rank p, int64 on the host; `held_N`: those of this
    rank, on its device, None if they all have. `slots_T`: where each row's K and V go, int64; the
    scratch page if they belong on another rank.
    """

    num_rows: int
    held: tuple[np.ndarray, ...]
    held_N: Tensor | None
    slots_T: Tensor
