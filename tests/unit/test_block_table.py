"""From extents to slots and runs, and from a plan to what each rank attends to."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from csps.attention.shards import Run
from csps.core.plan import Lane, StepPlan, Work
from csps.core.shards import Extent, Slice, zigzag
from csps.engine.batch import decode_batch, own_slices, prefill_batch, token_batch
from csps.engine.block_table import BlockTable

CPU = torch.device("cpu")


def table(*extents: Extent, block_size: int = 4) -> BlockTable:
    made = BlockTable(block_size)
    made.extend(extents)
    return made


def test_runs_join_neighbouring_pages_of_one_rank() -> None:
    blocks = table(Extent(0, 2, 2), Extent(1, 0, 1), Extent(0, 4, 1), Extent(0, 9, 1))
    assert blocks.runs(0, 20) == (Run(8, 12), Run(36, 4))
    assert blocks.runs(1, 20) == (Run(0, 4),)
    assert blocks.runs(0, 6) == (Run(8, 6),)
    assert blocks.shard_tokens(11, 2) == (8, 3)
    assert blocks.slots(10, 14) == [2, 3, 16, 17]


@given(st.integers(1, 400), st.integers(1, 4), st.integers(1, 9))
def test_every_position_has_one_slot_on_one_rank(tokens, ranks, block_size) -> None:
    blocks = BlockTable(block_size)
    pages = [0] * ranks
    for piece in zigzag(0, tokens, ranks, block_size):
        count = -(-piece.num_tokens // block_size)
        blocks.extend([Extent(piece.rank, pages[piece.rank], count)])
        pages[piece.rank] += count
    held = blocks.shard_tokens(tokens, ranks)
    assert sum(held) == tokens
    for rank in range(ranks):
        slots = [slot for run in blocks.runs(rank, tokens) for slot in range(*_bounds(run))]
        own = [s for s in zigzag(0, tokens, ranks, block_size) if s.rank == rank]
        assert slots == [slot for s in own for slot in blocks.slots(s.start, s.stop)]
        assert len(slots) == held[rank]


def _bounds(run: Run) -> tuple[int, int]:
    return run.first_slot, run.first_slot + run.num_tokens


def test_prefill_batch_of_a_spanning_and_a_whole_sequence() -> None:
    long = Work(1, 0, tuple(range(100, 116)), zigzag(0, 16, 2, 4), sample=True)
    short = Work(2, 0, (7, 8, 9), (Slice(1, 0, 3),), sample=True)
    plan = StepPlan(Lane.PREFILL, 0, (long, short))
    tables = {
        1: table(Extent(0, 0, 1), Extent(1, 0, 2), Extent(0, 1, 1)),
        2: table(Extent(1, 5, 1)),
    }
    tokens = token_batch(plan, 1, CPU)
    assert tokens.token_ids_T.tolist() == [*range(104, 112), 7, 8, 9]
    assert tokens.positions_T.tolist() == [*range(4, 12), 0, 1, 2]
    assert [(s.seq_id, s.row, s.position) for s in tokens.samples] == [(2, 10, 3)]
    batch = prefill_batch(plan, tables, 1, 2, CPU)
    spanning, whole = batch.sequences
    assert spanning.spans_ranks
    assert not whole.spans_ranks
    # The middle two runs of the zigzag are one; it sees rank 0's first block and no more.
    assert [(q.row, q.num_tokens, q.visible) for q in spanning.queries] == [(0, 8, (4, 0))]
    assert spanning.shard_tokens == (8, 8)
    assert batch.slots_T.tolist() == [*range(8), 20, 21, 22]
    assert own_slices(long, 0) == [Slice(0, 0, 4), Slice(0, 12, 16)]


def test_decode_batch_ships_to_holders_only() -> None:
    tables = {1: table(Extent(0, 0, 1), Extent(1, 0, 1)), 2: table(Extent(1, 1, 1))}
    plan = StepPlan(
        Lane.DECODE,
        0,
        (
            Work(1, 6, (50,), (Slice(1, 6, 7),), sample=True),
            Work(2, 1, (60,), (Slice(1, 1, 2),), sample=True),
        ),
    )
    master = decode_batch(plan, tables, 1, 2, CPU)
    assert master.shards == ((Run(0, 3),), (Run(4, 2),))
    assert master.slots_T.tolist() == [2, 5]
    assert {peer: rows.tolist() for peer, rows in master.shipped.items()} == {0: [0]}
    holder = decode_batch(plan, tables, 0, 2, CPU)
    assert holder.shards == ()
    assert holder.answered == {1: ((Run(0, 4),),)}
