"""Runs StepPlans on one rank: plan -> tensors -> model -> sampled tokens."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csps.attention.prefill import PrefillAttention
from csps.core.attention import SparseReport
from csps.core.plan import Lane, Layout, SampledToken, ScoredTokens, StepPlan, StepResult, StepStats
from csps.core.request import SamplingParams
from csps.engine.batch import SampleRow
from csps.engine.block_table import BlockTable
from csps.engine.bucketed import BucketedDecode
from csps.engine.drawn import share_drawn
from csps.engine.lane import LaneEngine, LayoutEngine
from csps.engine.placements import PlacedAttention, StepInputs
from csps.engine.sampler import Draw, sample
from csps.engine.scorer import score
from csps.parallel.upload import upload


@dataclass(slots=True)
class _SequenceState:
    """What a rank remembers of a sequence between plans."""

    table: BlockTable
    sampling: SamplingParams
    num_drawn: int = 0
    newest: int = 0  # token of a lane that is planned ahead


class _Outputs(NamedTuple):
    """What a step tells the coordinator, but for how long it took."""

    sampled: tuple[SampledToken, ...]
    scored: tuple[ScoredTokens, ...] = ()
    sparse: tuple[SparseReport, ...] = ()


@dataclass(slots=True)
class Runner:
    """One rank. A sequence is in one lane at a time, so lanes may run in two threads.

    `bucketed`: runs the steps it takes, where there is one. `keeps_drawn`: plans may have pending
    tokens.
    """

    rank: int
    attention: PlacedAttention
    lanes: Mapping[Lane, LaneEngine]
    block_size: int
    eos_ids: frozenset[int]
    device: torch.device
    bucketed: BucketedDecode | None = None
    keeps_drawn: bool = True
    _states: dict[int, _SequenceState] = field(default_factory=dict)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Run one step; collective over all ranks of the plan's layout."""
        begun = time.perf_counter()
        lane = self.lanes[plan.lane]
        layout = lane.layouts[plan.layout]
        lane.clock.reset()
        self._update_states(plan)
        plan = self._fill_in(plan)
        tables = {work.seq_id: self._states[work.seq_id].table for work in plan.work}
        if self.bucketed is not None and self.bucketed.takes(plan):
            logits_NV, rows = self.bucketed.run(plan, tables)
            drawn = () if logits_NV is None or not rows else self._draw(logits_NV, rows)
            outputs = _Outputs(drawn)
        else:
            outputs = self._compute(layout, self.attention.inputs(plan, tables, lane))
        for work in plan.work:
            self._states[work.seq_id].num_drawn += work.sample
        if self.keeps_drawn and plan.lane is not Lane.PREFILL:
            everywhere = lane.layouts[Layout.TP].comm
            drawn = share_drawn(plan, outputs.sampled, everywhere, self.device)
            for seq_id, token_id in drawn.items():
                self._states[seq_id].newest = token_id
        if self.device.type == "cuda":
            # What is reported is done: its pages may pass to the other lane, on another stream.
            torch.cuda.current_stream(self.device).synchronize()
        lane.clock.settle()
        wall_s = time.perf_counter() - begun
        return StepResult(
            rank=self.rank,
            lane=plan.lane,
            step_id=plan.step_id,
            sampled=outputs.sampled,
            stats=StepStats(
                wall_s=wall_s,
                compute_s=wall_s - lane.clock.exposed_s,
                comm_s=lane.clock.comm_s,
                exposed_comm_s=lane.clock.exposed_s,
                bytes_sent=dict(lane.clock.bytes_sent),
                bytes_received=dict(lane.clock.bytes_received),
            ),
            sparse=outputs.sparse,
            scored=outputs.scored,
        )

    def release(self, seq_ids: list[int]) -> None:
        """Forget sequences; none of them is in a step under way."""
        for seq_id in seq_ids:
            self._states.pop(seq_id, None)

    def close(self) -> None:
        """No step is under way, and none follows.

        NCCL ends no communicator while there is a CUDA graph that has captured its transfers: it
        would wait for ever.
        """
        self.bucketed = None
        for lane in self.lanes.values():
            lane.sequence.close()

    def _update_states(self, plan: StepPlan) -> None:
        for work in plan.work:
            if work.sampling is not None:
                self._states[work.seq_id] = _SequenceState(
                    BlockTable(self.block_size), work.sampling
                )
            self._states[work.seq_id].table.extend(work.new_extents)

    def _fill_in(self, plan: StepPlan) -> StepPlan:
        """The plan with the tokens that the step before drew."""
        if not any(work.pending for work in plan.work):
            return plan
        works = (
            work._replace(token_ids=(self._states[work.seq_id].newest,), pending=False)
            if work.pending
            else work
            for work in plan.work
        )
        return replace(plan, work=tuple(works))

    def _compute(self, layout: LayoutEngine, inputs: StepInputs) -> _Outputs:
        hidden_TE = _forward(layout, inputs)
        sampled: tuple[SampledToken, ...] = ()
        if samples := inputs.tokens.samples:
            (rows_N,) = upload([np.array([row.row for row in samples])], self.device)
            logits_NV = layout.logits(hidden_TE[rows_N])
            if logits_NV is not None:
                sampled = self._draw(logits_NV, samples)
        scored = score(layout.logits, hidden_TE, inputs.tokens.scores)
        attend = inputs.attend
        sparse = attend.reports() if isinstance(attend, PrefillAttention) else ()
        return _Outputs(sampled, scored, sparse)

    def _draw(self, logits_NV: Tensor, rows: Sequence[SampleRow]) -> tuple[SampledToken, ...]:
        """One token from each row of logits."""
        draws = []
        for row in rows:
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
        return tuple(sample(logits_NV, draws))


def _forward(layout: LayoutEngine, inputs: StepInputs) -> Tensor:
    """The residual stream [T, E] of this rank's rows."""
    model, tokens, attend = layout.model, inputs.tokens, inputs.attend
    config = model.config
    if tokens.num_tokens:
        return model(tokens.token_ids_T, tokens.positions_T, attend, inputs.rotate)
    # Nothing to compute here, but peers may need this rank's KV in every layer.
    weight = model.embedding
    none_THD = weight.new_empty(0, config.num_heads, config.head_dim)
    none_TKD = weight.new_empty(0, config.num_kv_heads, config.head_dim)
    for layer in range(config.num_layers):
        attend(layer, none_THD, none_TKD, none_TKD)
    return weight.new_empty(0, config.hidden_size)
