"""A StepPlan as one rank's tensors: tokens, positions, slots, and who attends to what."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from csps.attention.shards import (
    DecodeBatch,
    HeadsBatch,
    HeadsSequence,
    HelixBatch,
    PrefillBatch,
    PrefillSequence,
    QueryRun,
    Run,
    SparseSequence,
)
from csps.core.plan import StepPlan, Work
from csps.core.shards import Slice
from csps.engine.block_table import BlockTable
from csps.parallel.upload import upload


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A row of the batch whose logits are drawn from."""

    seq_id: int
    row: int
    position: int  # of the token that is drawn


@dataclass(frozen=True, slots=True)
class ScoreRun:
    """Rows [row, row + len(token_ids)), each of which scores the token that follows it."""

    seq_id: int
    row: int
    position: int  # of the first token that is scored
    token_ids: Sequence[int]

    def part(self, start: int, stop: int) -> list["ScoreRun"]:
        """What lies in rows [start, stop), which become rows from 0 on; one run or none."""
        first = max(self.row, start)
        behind = min(self.row + len(self.token_ids), stop)
        if first >= behind:
            return []
        token_ids = self.token_ids[first - self.row : behind - self.row]
        return [ScoreRun(self.seq_id, first - start, self.position + first - self.row, token_ids)]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """This rank's tokens of a step, all sequences behind one another; int64 [T] each."""

    token_ids_T: Tensor
    positions_T: Tensor
    samples: tuple[SampleRow, ...]
    scores: tuple[ScoreRun, ...]

    @property
    def num_tokens(self) -> int:
        return self.token_ids_T.shape[0]

    def part(self, start: int, stop: int) -> "TokenBatch":
        """Rows [start, stop) as a batch of their own."""
        return TokenBatch(
            token_ids_T=self.token_ids_T[start:stop],
            positions_T=self.positions_T[start:stop],
            samples=tuple(
                replace(sample, row=sample.row - start)
                for sample in self.samples
                if start <= sample.row < stop
            ),
            scores=tuple(part for run in self.scores for part in run.part(start, stop)),
        )


def token_batch(plan: StepPlan, rank: int | None, device: torch.device) -> TokenBatch:
    """The rows this rank computes (None: all), in plan order, then position order."""
    token_ids: list[int] = []
    positions: list[int] = []
    samples: list[SampleRow] = []
    scores: list[ScoreRun] = []
    for work in plan.work:
        for piece in own_slices(work, rank):
            scores += _score_runs(work, piece, len(token_ids))
            token_ids += work.token_ids[piece.start - work.start : piece.stop - work.start]
            positions += range(piece.start, piece.stop)
        if work.sample and rank in (None, work.slices[-1].rank):
            samples.append(SampleRow(work.seq_id, len(token_ids) - 1, work.stop))
    columns = [np.array(column, dtype=np.int64) for column in (token_ids, positions)]
    return TokenBatch(*upload(columns, device), samples=tuple(samples), scores=tuple(scores))


def _score_runs(work: Work, piece: Slice, row: int) -> list[ScoreRun]:
    """The targets that the rows of `piece`, which begin at `row`, come right before."""
    if work.targets is None:
        return []
    at, token_ids = work.targets
    first = max(at, piece.start + 1)
    behind = min(at + len(token_ids), piece.stop + 1)
    if first >= behind:
        return []
    targets = token_ids[first - at : behind - at]
    return [ScoreRun(work.seq_id, row + first - 1 - piece.start, first, targets)]


def own_slices(work: Work, rank: int | None) -> list[Slice]:
    """Slices of `rank` (None: all), neighbours joined: the middle two of a zigzag are one."""
    joined: list[Slice] = []
    for piece in work.slices:
        if rank not in (None, piece.rank):
            continue
        if joined and joined[-1].stop == piece.start:
            joined[-1] = Slice(piece.rank, joined[-1].start, piece.stop)
        else:
            joined.append(piece)
    return joined


def prefill_batch(
    plan: StepPlan, tables: dict[int, BlockTable], rank: int, num_ranks: int, device: torch.device
) -> PrefillBatch:
    """Every sequence of the step, also those this rank computes nothing of."""
    sequences: list[PrefillSequence] = []
    sparse: list[SparseSequence] = []
    slots: list[int] = []
    first_rows = [0] * num_ranks
    for work in plan.work:
        table = tables[work.seq_id]
        if work.attention.is_sparse:
            sparse.append(_sparse_sequence(work, table, rank, num_ranks, first_rows[rank]))
        queries = [
            _query_runs(work, table, peer, num_ranks, first_rows[peer]) for peer in range(num_ranks)
        ]
        for peer, runs in enumerate(queries):
            first_rows[peer] += sum(run.num_tokens for run in runs)
        for piece in own_slices(work, rank):
            slots += table.slots(piece.start, piece.stop)
        if not work.attention.is_sparse:
            sequences.append(
                PrefillSequence(
                    queries=queries[rank],
                    queries_by_rank=tuple(queries),
                    shard_tokens=table.shard_tokens(work.stop, num_ranks),
                    runs=table.runs(rank, work.stop),
                )
            )
    (slots_T,) = upload([np.array(slots, dtype=np.int64)], device)
    return PrefillBatch(tuple(sequences), tuple(sparse), slots_T)


def _query_runs(
    work: Work, table: BlockTable, rank: int, num_ranks: int, row: int
) -> tuple[QueryRun, ...]:
    """What `rank` computes of a sequence, as its rows from `row` on."""
    runs = []
    for piece in own_slices(work, rank):
        visible = table.shard_tokens(piece.start, num_ranks)
        runs.append(QueryRun(row, piece.num_tokens, visible))
        row += piece.num_tokens
    return tuple(runs)


def _sparse_sequence(
    work: Work, table: BlockTable, rank: int, num_ranks: int, first_row: int
) -> SparseSequence:
    size = table.block_size
    num_blocks = -(-work.stop // size)
    held = [table.blocks(peer, num_blocks) for peer in range(num_ranks)]
    tiles = []
    for peer in range(num_ranks):
        slices = own_slices(work, peer)
        # A tile on two ranks would have its diagonal on one of them only.
        assert all(piece.start % size == 0 for piece in slices), "a slice starts inside a block"
        ranges = [np.arange(piece.start // size, -(-piece.stop // size)) for piece in slices]
        tiles.append(np.concatenate([np.empty(0, np.int64), *ranges]))
    return SparseSequence(
        seq_id=work.seq_id,
        params=work.attention,
        block_size=size,
        num_tokens=work.stop,
        first_row=first_row,
        last_tile=num_blocks - 1 if work.sample else -1,
        tiles=tuple(tiles),
        blocks=tuple(blocks for blocks, _ in held),
        pages=held[rank][1],
    )


def decode_batch(
    plan: StepPlan, tables: dict[int, BlockTable], rank: int, num_ranks: int, device: torch.device
) -> DecodeBatch:
    """One token per sequence; the rank of its slice is its master."""
    slots: list[int] = []
    shards: list[tuple[Run, ...]] = []
    shipped: dict[int, list[int]] = {}
    answered: dict[int, list[tuple[Run, ...]]] = {}
    for work in plan.work:
        table = tables[work.seq_id]
        master = work.slices[0].rank
        held = table.shard_tokens(work.stop, num_ranks)
        if master == rank:
            for peer in range(num_ranks):
                if peer != rank and held[peer]:
                    shipped.setdefault(peer, []).append(len(shards))
            slots += table.slots(work.start, work.stop)
            shards.append(table.runs(rank, work.stop))
        elif held[rank]:
            answered.setdefault(master, []).append(table.runs(rank, work.stop))
    (slots_T,) = upload([np.array(slots, dtype=np.int64)], device)
    return DecodeBatch(
        shards=tuple(shards),
        slots_T=slots_T,
        shipped={peer: np.array(rows, dtype=np.int64) for peer, rows in shipped.items()},
        answered={peer: tuple(runs) for peer, runs in answered.items()},
    )


def heads_batch(plan: StepPlan, tables: dict[int, BlockTable], device: torch.device) -> HeadsBatch:
    """Every sequence of a step whose KV is sharded by head: all its blocks are here."""
    sequences: list[HeadsSequence] = []
    slots: list[int] = []
    for work in plan.work:
        table = tables[work.seq_id]
        num_keys = work.stop if work.num_tokens == 1 else work.start
        sequences.append(HeadsSequence(len(slots), work.num_tokens, table.runs(0, num_keys)))
        slots += table.slots(work.start, work.stop)
    (slots_T,) = upload([np.array(slots, dtype=np.int64)], device)
    return HeadsBatch(tuple(sequences), slots_T)


def helix_batch(
    plan: StepPlan,
    tables: dict[int, BlockTable],
    rank: int,
    num_ranks: int,
    scratch_slot: int,
    device: torch.device,
) -> tuple[HelixBatch, list[tuple[Run, ...]]]:
    """One token per sequence, all of them on every rank; its slice says who keeps its KV.

    Also the keys here of each row that has some, its own included where it is kept here.
    """
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    shards: list[tuple[Run, ...]] = []
    slots: list[int] = []
    for row, work in enumerate(plan.work):
        table = tables[work.seq_id]
        for peer, tokens in enumerate(table.shard_tokens(work.stop, num_ranks)):
            if tokens:
                held[peer].append(row)
        if held[rank][-1:] == [row]:
            shards.append(table.runs(rank, work.stop))
        is_own = work.slices[0].rank == rank
        slots += table.slots(work.start, work.stop) if is_own else [scratch_slot]
    columns = [np.array(column, dtype=np.int64) for column in (held[rank], slots)]
    held_N, slots_T = upload(columns, device)
    batch = HelixBatch(
        num_rows=len(plan.work),
        held=tuple(np.array(rows, dtype=np.int64) for rows in held),
        held_N=None if len(held_N) == len(plan.work) else held_N,
        slots_T=slots_T,
    )
    return batch, shards
