"""Runs StepPlans on one rank: plan -> tensors -> model -> sampled tokens."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from csps.attention.backends import Kernels
from csps.attention.decode import QueryShip
from csps.attention.prefill import PrefillAttention
from csps.attention.transfer import KVShape
from csps.core.attention import CsaConfig
from csps.core.plan import Lane, SampledToken, StepPlan, StepResult, StepStats
from csps.core.request import SamplingParams
from csps.engine.batch import TokenBatch, decode_batch, prefill_batch, token_batch
from csps.engine.block_table import BlockTable
from csps.engine.kv_pool import KVPool
from csps.engine.sampler import Draw, sample
from csps.engine.scorer import score
from csps.model.llama import Attend, Llama
from csps.parallel.collectives import SequenceComm
from csps.parallel.overlap import CommClock


@dataclass(slots=True)
class LaneEngine:
    """What one lane runs with: its module tree (over the shared weights) and its traffic."""

    model: Llama
    comm: SequenceComm
    clock: CommClock


@dataclass(slots=True)
class _SequenceState:
    """What a rank remembers of a sequence between plans."""

    table: BlockTable
    sampling: SamplingParams
    num_drawn: int = 0


@dataclass(slots=True)
class Runner:
    """One rank. A sequence is in one lane at a time, so lanes may run in two threads."""

    rank: int
    num_ranks: int
    samples: bool  # one rank of each tensor row draws and scores tokens
    pool: KVPool
    kernels: Kernels
    csa: CsaConfig
    first_head: int  # of the KV heads this rank has
    block_size: int
    eos_ids: frozenset[int]
    device: torch.device
    lanes: dict[Lane, LaneEngine]
    _states: dict[int, _SequenceState] = field(default_factory=dict)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Run one step; collective over the ranks of the sequence axis."""
        begun = time.perf_counter()
        lane = self.lanes[plan.lane]
        lane.clock.reset()
        self._update_states(plan)
        tokens = token_batch(plan, self.rank, self.device)
        attend = self._attend(plan, lane)
        hidden_TE = self._forward(lane, tokens, attend)
        sampled = self._sample(lane.model, tokens, hidden_TE)
        scored = score(lane.model, hidden_TE, tokens.scores) if self.samples else ()
        for work in plan.work:
            self._states[work.seq_id].num_drawn += work.sample
        wall_s = time.perf_counter() - begun
        return StepResult(
            rank=self.rank,
            lane=plan.lane,
            step_id=plan.step_id,
            sampled=sampled,
            stats=StepStats(
                wall_s=wall_s,
                compute_s=wall_s - lane.clock.exposed_s,
                comm_s=lane.clock.comm_s,
                exposed_comm_s=lane.clock.exposed_s,
                bytes_sent=dict(lane.clock.bytes_sent),
                bytes_received=dict(lane.clock.bytes_received),
            ),
            sparse=attend.reports() if isinstance(attend, PrefillAttention) else (),
            scored=scored,
        )

    def release(self, seq_ids: list[int]) -> None:
        """Forget sequences; none of them is in a step under way."""
        for seq_id in seq_ids:
            self._states.pop(seq_id, None)

    def _update_states(self, plan: StepPlan) -> None:
        for work in plan.work:
            if work.sampling is not None:
                self._states[work.seq_id] = _SequenceState(
                    BlockTable(self.block_size), work.sampling
                )
            self._states[work.seq_id].table.extend(work.new_extents)

    def _attend(self, plan: StepPlan, lane: LaneEngine) -> Attend:
        tables = {work.seq_id: self._states[work.seq_id].table for work in plan.work}
        if plan.lane is Lane.PREFILL:
            batch = prefill_batch(plan, tables, self.rank, self.num_ranks, self.device)
            return PrefillAttention(
                batch,
                self.pool,
                lane.comm,
                self.kernels,
                self.csa,
                self._kv_shape(lane.model),
                num_kv_heads=lane.model.config.num_kv_heads,
                first_head=self.first_head,
            )
        shards = decode_batch(plan, tables, self.rank, self.num_ranks, self.device)
        return QueryShip(shards, self.pool, lane.comm, self.kernels.partial)

    def _kv_shape(self, model: Llama) -> KVShape:
        return KVShape(
            block_size=self.block_size,
            group_size=model.config.group_size,
            head_dim=model.config.head_dim,
            dtype=model.embedding.dtype,
            wire=self.csa.wire,
        )

    def _forward(self, lane: LaneEngine, tokens: TokenBatch, attend: Attend) -> Tensor:
        config = lane.model.config
        if tokens.num_tokens:
            return lane.model(tokens.token_ids_T, tokens.positions_T, attend)
        # Nothing to compute here, but peers may need this rank's KV in every layer.
        weight = lane.model.embedding
        none_THD = weight.new_empty(0, config.num_heads, config.head_dim)
        none_TKD = weight.new_empty(0, config.num_kv_heads, config.head_dim)
        for layer in range(config.num_layers):
            attend(layer, none_THD, none_TKD, none_TKD)
        return weight.new_empty(0, config.hidden_size)

    def _sample(
        self, model: Llama, tokens: TokenBatch, hidden_TE: Tensor
    ) -> tuple[SampledToken, ...]:
        if not tokens.samples or not self.samples:
            return ()
        rows = torch.tensor([row.row for row in tokens.samples], device=self.device)
        draws = []
        for row in tokens.samples:
            state = self._states[row.seq_id]
            draws.append(
                Draw(
                    seq_id=row.seq_id,
                    params=state.sampling,
                    position=row.position,
                    num_drawn=state.num_drawn,
                    eos_ids=self.eos_ids,
                )
            )
        return tuple(sample(model.logits(hidden_TE[rows]), draws))
