"""From a plan to a rank's rows and the attention over them, by where KV is placed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from csps.attention.backends import HeadMessages, Kernels, RotateRows
from csps.attention.decode import query_ship
from csps.attention.heads import heads_attention
from csps.attention.helix import Helix
from csps.attention.kv import KVSlots
from csps.attention.prefill import PrefillAttention
from csps.attention.transfer import KVShape
from csps.attention.ulysses import Ulysses
from csps.core.attention import CsaConfig
from csps.core.heads import AxisHeads
from csps.core.plan import Lane, Layout, StepPlan
from csps.engine.batch import (
    TokenBatch,
    decode_batch,
    heads_batch,
    helix_batch,
    prefill_batch,
    token_batch,
)
from csps.engine.block_table import BlockTable
from csps.engine.kv_pool import KVPool
from csps.engine.lane import LaneEngine
from csps.model.llama import Attend

Tables = Mapping[int, BlockTable]


class StepInputs(NamedTuple):
    """The rows whose linear layers this rank computes, and what rotates them and attends."""

    tokens: TokenBatch
    rotate: RotateRows
    attend: Attend


class PlacedAttention(Protocol):
    """How one placement of KV runs a step; collective where a step's sequences span ranks."""

    def inputs(self, plan: StepPlan, tables: Tables, lane: LaneEngine) -> StepInputs:
        """`tables` has every sequence of the plan."""
        ...


@dataclass(frozen=True, slots=True)
class TokensAttention:
    """KV by token range over the sequence axis: rank `rank` of `num_ranks` there.

    `messages`: of `heads` on this rank.
    """

    rank: int
    num_ranks: int
    pool: KVPool
    kernels: Kernels
    csa: CsaConfig
    heads: AxisHeads
    messages: HeadMessages
    shape: KVShape
    device: torch.device

    def inputs(self, plan: StepPlan, tables: Tables, lane: LaneEngine) -> StepInputs:
        is_helix = plan.layout is Layout.TP and self.num_ranks > 1
        if not self.heads.resident.num_heads:
            rank = None if is_helix else self.rank
            tokens = token_batch(plan, rank, self.device)
            rotate = _rotate(self.kernels, plan, lane, tokens, None)
            return StepInputs(tokens, rotate, attend_with_no_heads)
        if is_helix:
            return self._helix(plan, tables, lane)
        tokens = token_batch(plan, self.rank, self.device)
        if plan.lane is Lane.DECODE:
            shards = decode_batch(plan, tables, self.rank, self.num_ranks, self.device)
            rotate = _rotate(self.kernels, plan, lane, tokens, KVSlots(self.pool, shards.slots_T))
            ship = query_ship(shards, self.pool, lane.sequence, self.kernels)
            return StepInputs(tokens, rotate, ship)
        batch = prefill_batch(plan, tables, self.rank, self.num_ranks, self.device)
        rotate = _rotate(self.kernels, plan, lane, tokens, KVSlots(self.pool, batch.slots_T))
        attention = PrefillAttention(
            batch,
            self.pool,
            lane.sequence,
            self.kernels,
            self.csa,
            self.shape,
            num_kv_heads=self.heads.resident.num_kv_heads,
            first_head=self.heads.resident.first,
        )
        return StepInputs(tokens, rotate, attention)

    def _helix(self, plan: StepPlan, tables: Tables, lane: LaneEngine) -> StepInputs:
        assert plan.lane is Lane.DECODE, "prompts are split by tokens"
        batch, shards = helix_batch(
            plan, tables, self.rank, self.num_ranks, self.pool.scratch_slot, self.device
        )
        attend = self.kernels.paged_decode(self.pool, shards)
        attention = Helix(
            batch,
            attend,
            self.pool,
            lane.sequence,
            self.kernels.merge,
            self.heads,
            self.messages,
        )
        tokens = token_batch(plan, None, self.device)
        return StepInputs(tokens, _rotate(self.kernels, plan, lane, tokens, None), attention)


def attend_with_no_heads(layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
    """Where more ranks share the weights than there are heads: nobody in the column has any."""
    return q_THD.new_empty(q_THD.shape)


@dataclass(frozen=True, slots=True)
class HeadsSharded:
    """KV by head over all ranks: this rank's is that of its part of `heads`.

    `messages`: of `heads` on this rank.
    """

    pool: KVPool
    kernels: Kernels
    heads: AxisHeads
    messages: HeadMessages
    device: torch.device

    def inputs(self, plan: StepPlan, tables: Tables, lane: LaneEngine) -> StepInputs:
        tokens = token_batch(plan, None, self.device)
        batch = heads_batch(plan, tables, self.device)
        slots = KVSlots(self.pool, batch.slots_T)
        attention = heads_attention(batch, self.pool, self.kernels)
        num_ranks, rank = lane.sequence.size, lane.sequence.rank
        if plan.layout is Layout.TP or num_ranks == 1:
            rotate = _rotate(self.kernels, plan, lane, tokens, slots)
            return StepInputs(tokens, rotate, attention)
        bounds = [peer * tokens.num_tokens // num_ranks for peer in range(num_ranks + 1)]
        ulysses = Ulysses(attention, slots, lane.sequence, self.heads, self.messages, bounds)
        part = tokens.part(bounds[rank], bounds[rank + 1])
        return StepInputs(part, _rotate(self.kernels, plan, lane, part, None), ulysses)


def _rotate(
    kernels: Kernels, plan: StepPlan, lane: LaneEngine, tokens: TokenBatch, slots: KVSlots | None
) -> RotateRows:
    """`slots`: of these tokens; None where their K and V are stored after an exchange."""
    return kernels.rotate(lane.layouts[plan.layout].model.rope_PD, tokens.positions_T, slots)
