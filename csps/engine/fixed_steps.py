"""Decode steps whose tensors stay where they are, by where KV is placed.

A step has room for so many rows. Those that are left over write their K and V to the pool's
scratch page, see no key, and nobody draws from them. Where a step spans ranks, each of them sends
as much as any other time, whoever holds what: so what is launched is the same at every step.

Suffixes: N rows.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from csps.attention.backends import FixedDecode, FixedRows, Kernels
from csps.attention.decode import QueryShip
from csps.attention.heads import HeadsAttention
from csps.attention.helix import Helix
from csps.attention.kv import KVSlots
from csps.attention.shards import HelixBatch, Run
from csps.attention.ship import QueryExchange
from csps.attention.ulysses import Ulysses
from csps.core.plan import Layout, StepPlan, Work
from csps.core.strategy import Placement
from csps.engine.batch import SampleRow
from csps.engine.block_table import BlockTable
from csps.engine.kv_pool import KVPool
from csps.engine.lane import LaneEngine
from csps.engine.placements import HeadsSharded, TokensAttention, attend_with_no_heads
from csps.model.llama import Attend
from csps.parallel.upload import refill

Tables = Mapping[int, BlockTable]


class FixedInputs(NamedTuple):
    """This rank's rows of every step: their tensors are filled anew for each.

    `slots`: of these rows; None where their K and V are stored after an exchange.
    """

    token_ids_N: Tensor
    positions_N: Tensor
    slots: KVSlots | None
    attend: Attend


class FixedStep(Protocol):
    """Steps of up to a number of rows."""

    @property
    def inputs(self) -> FixedInputs: ...

    def load(self, plan: StepPlan, tables: Tables) -> list[SampleRow]:
        """Take a plan's rows; those of this rank, from its first on, in order."""
        ...


class FixedSteps(Protocol):
    """Makes them, for the decode of one lane."""

    def num_rows(self, plan: StepPlan) -> int:
        """Rows that a step must have room for; the same on every rank."""
        ...

    def make(self, layout: Layout, num_rows: int) -> FixedStep:
        """Steps with room for `num_rows`."""
        ...


def fixed_steps(placed: TokensAttention | HeadsSharded, lane: LaneEngine) -> FixedSteps:
    """What runs decode steps in place. The `paged_decode` of its kernels must be a FixedDecode."""
    if isinstance(placed, HeadsSharded):
        return _HeadsSteps(placed, lane)
    return _TokensSteps(placed, lane)


def fixed_rows(
    placement: Placement, layouts: Sequence[Layout], num_ranks: int, num_rows: int
) -> list[int]:
    """Rows of each `FixedRows` that steps of `num_rows` take, in all layouts.

    `num_ranks`: of the sequence axis. A rank without heads takes none.
    """
    if num_ranks == 1:
        return [num_rows]
    if placement is Placement.HEADS:
        return [max(num_rows, num_ranks) for _ in layouts]
    shipped = [num_rows, (num_ranks - 1) * num_rows]
    return [rows for x in layouts for rows in (shipped if x is Layout.SP else [num_rows])]


@dataclass(frozen=True, slots=True)
class _HeadsSteps:
    placed: HeadsSharded
    lane: LaneEngine

    def num_rows(self, plan: StepPlan) -> int:
        return len(plan.work)

    def make(self, layout: Layout, num_rows: int) -> FixedStep:
        # In the SP layout no rank is without a row.
        num_rows = max(num_rows, self.lane.sequence.size)
        return _ByHead(self.placed, self.lane, layout, num_rows)


@dataclass(frozen=True, slots=True)
class _TokensSteps:
    placed: TokensAttention
    lane: LaneEngine

    def num_rows(self, plan: StepPlan) -> int:
        if self._is_helix(plan.layout):
            return len(plan.work)
        return max(Counter(_master(work) for work in plan.work).values())

    def make(self, layout: Layout, num_rows: int) -> FixedStep:
        if self._is_helix(layout):
            return _Helix(self.placed, self.lane, num_rows)
        return _Shipped(self.placed, self.lane, num_rows)

    def _is_helix(self, layout: Layout) -> bool:
        return layout is Layout.TP and self.placed.num_ranks > 1


class _Rows:
    """Token ids, positions and slots of a step's rows."""

    def __init__(self, num_rows: int, pool: KVPool, device: torch.device) -> None:
        self._pool = pool
        self._none_3N = np.zeros((3, num_rows), dtype=np.int64)
        self._none_3N[2] = pool.scratch_slot
        self._on_device_3N = torch.from_numpy(self._none_3N).to(device, copy=True)

    def load(self, works: Sequence[Work], slots: Sequence[int]) -> None:
        rows_3N = self._none_3N.copy()
        for row, (work, slot) in enumerate(zip(works, slots, strict=True)):
            rows_3N[:, row] = work.token_ids[0], work.start, slot
        refill(self._on_device_3N, rows_3N)

    def inputs(
        self, attend: Attend, slots: KVSlots | None, part: slice = slice(None)
    ) -> FixedInputs:
        """Of the rows `part`."""
        token_ids_N, positions_N = self._on_device_3N[:2, part]
        return FixedInputs(token_ids_N, positions_N, slots, attend)

    @property
    def slots(self) -> KVSlots:
        return KVSlots(self._pool, self._on_device_3N[2])


class _Shipped:
    """KV by token range; a row is computed where its K and V go (csps.attention.decode)."""

    def __init__(self, placed: TokensAttention, lane: LaneEngine, num_rows: int) -> None:
        self._rank, self._num_rows = placed.rank, num_rows
        self._peers = [peer for peer in range(placed.num_ranks) if peer != placed.rank]
        self._rows = _Rows(num_rows, placed.pool, placed.device)
        self._own = _fixed(placed.kernels, placed.pool, num_rows)
        self._asked = _fixed(placed.kernels, placed.pool, len(self._peers) * num_rows)
        away = None
        if self._peers:
            all_rows = np.arange(num_rows)
            exchange = QueryExchange(
                lane.sequence,
                placed.kernels.merge,
                shipped=dict.fromkeys(self._peers, all_rows),
                num_asked=dict.fromkeys(self._peers, num_rows),
                num_rows=num_rows,
                device=placed.device,
            )
            away = exchange, self._asked
        self.inputs = _with_heads(
            self._rows.inputs(QueryShip(self._own, away), self._rows.slots), placed
        )

    def load(self, plan: StepPlan, tables: Tables) -> list[SampleRow]:
        works: dict[int, list[Work]] = {rank: [] for rank in (self._rank, *self._peers)}
        for work in plan.work:
            works[_master(work)].append(work)
        own = works.pop(self._rank)
        self._rows.load(own, [_slot(work, tables) for work in own])
        self._own.load([tables[work.seq_id].runs(self._rank, work.stop) for work in own])
        asked: list[tuple[Run, ...]] = []
        for of_peer in works.values():
            asked += [tables[work.seq_id].runs(self._rank, work.stop) for work in of_peer]
            asked += [()] * (self._num_rows - len(of_peer))
        self._asked.load(asked)
        return _drawn(own)


class _Helix:
    """KV by token range; every rank has all rows (csps.attention.helix)."""

    def __init__(self, placed: TokensAttention, lane: LaneEngine, num_rows: int) -> None:
        self._rank, self._scratch_slot = placed.rank, placed.pool.scratch_slot
        self._rows = _Rows(num_rows, placed.pool, placed.device)
        self._held = _fixed(placed.kernels, placed.pool, num_rows)
        batch = HelixBatch(
            num_rows=num_rows,
            held=(np.arange(num_rows),) * placed.num_ranks,
            held_N=None,
            slots_T=self._rows.slots.slots_T,
        )
        attend = Helix(
            batch,
            self._held,
            placed.pool,
            lane.sequence,
            placed.kernels.merge,
            placed.heads,
            placed.messages,
        )
        self.inputs = _with_heads(self._rows.inputs(attend, None), placed)

    def load(self, plan: StepPlan, tables: Tables) -> list[SampleRow]:
        slots = [
            _slot(work, tables) if _master(work) == self._rank else self._scratch_slot
            for work in plan.work
        ]
        self._rows.load(plan.work, slots)
        self._held.load([tables[work.seq_id].runs(self._rank, work.stop) for work in plan.work])
        return _drawn(plan.work)


class _ByHead:
    """KV by head, of all rows (csps.attention.heads); in the SP layout each rank has a part."""

    def __init__(
        self, placed: HeadsSharded, lane: LaneEngine, layout: Layout, num_rows: int
    ) -> None:
        self._rows = _Rows(num_rows, placed.pool, placed.device)
        self._single = _fixed(placed.kernels, placed.pool, num_rows)
        attend = HeadsAttention(
            [(slice(0, num_rows), self._single)], [], placed.pool, placed.kernels.partial
        )
        num_ranks, rank = lane.sequence.size, lane.sequence.rank
        if layout is Layout.TP or num_ranks == 1:
            self._part = slice(0, num_rows)
            self.inputs = self._rows.inputs(attend, self._rows.slots)
            return
        bounds = [peer * num_rows // num_ranks for peer in range(num_ranks + 1)]
        self._part = slice(bounds[rank], bounds[rank + 1])
        slots = self._rows.slots
        ulysses = Ulysses(attend, slots, lane.sequence, placed.heads, placed.messages, bounds)
        self.inputs = self._rows.inputs(ulysses, None, self._part)

    def load(self, plan: StepPlan, tables: Tables) -> list[SampleRow]:
        self._rows.load(plan.work, [_slot(work, tables) for work in plan.work])
        self._single.load([tables[work.seq_id].runs(0, work.stop) for work in plan.work])
        return _drawn(plan.work[self._part])


class _NoRows:
    """`FixedRows` where there is no row, or no head."""

    def load(self, shards: Sequence[tuple[Run, ...]]) -> None:
        return

    def __call__(self, layer: int, q_NHD: Tensor, o_NHD: Tensor, lse_NH: Tensor) -> None:
        return


def _fixed(kernels: Kernels, pool: KVPool, num_rows: int) -> FixedRows:
    assert isinstance(kernels.paged_decode, FixedDecode)
    k_KPBD, _ = pool.pages(0)
    return kernels.paged_decode.fixed(pool, num_rows) if num_rows and len(k_KPBD) else _NoRows()


def _with_heads(inputs: FixedInputs, placed: TokensAttention) -> FixedInputs:
    """Or without, where the rank has none."""
    if placed.heads.resident.num_heads:
        return inputs
    return inputs._replace(slots=None, attend=attend_with_no_heads)


def _master(work: Work) -> int:
    return work.slices[0].rank


def _slot(work: Work, tables: Tables) -> int:
    (slot,) = tables[work.seq_id].slots(work.start, work.stop)
    return slot


def _drawn(works: Sequence[Work]) -> list[SampleRow]:
    return [SampleRow(work.seq_id, row, work.stop) for row, work in enumerate(works)]
