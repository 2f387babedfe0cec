"""A finished step, and the row that records it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from csps.coordinator.sparse import SparseSummary
from csps.core.config import ServerConfig
from csps.core.heads import all_heads
from csps.core.model_config import ModelConfig
from csps.core.plan import StepPlan, StepResult
from csps.core.shards import Extent
from csps.records.rows import StepRow
from csps.sched.cost import shape_of
from csps.sched.layout import Decision
from csps.sched.volumes import Volumes

# The other kinds of bytes are attention's.
_NOT_ATTENTION = ("hidden", "logits", "drawn")


class FinishedStep(NamedTuple):
    """A step that all ranks have finished. `started`, `ended`: of time.time.

    `results` are in rank order. `kv_pages`: in use after it, by rank of the ledger. `extents`:
    blocks of its sequences by id, if any of them was prefilled sparsely.
    """

    plan: StepPlan
    results: Sequence[StepResult]
    decision: Decision
    started: float
    ended: float
    kv_pages: tuple[int, ...]
    extents: Mapping[int, tuple[Extent, ...]]


@dataclass(frozen=True, slots=True)
class RowBuilder:
    """Makes rows of steps. Costs some 50 microseconds each, so not where steps wait for it."""

    volumes: Volumes
    block_size: int

    def row(self, step: FinishedStep) -> StepRow:
        plan, stats = step.plan, [result.stats for result in step.results]
        bytes_sent: Counter[str] = Counter()
        for one in stats:
            bytes_sent.update(one.bytes_sent)
        sparse = SparseSummary()
        sparse.add((report for result in step.results for report in result.sparse), gamma=1.0)
        return StepRow(
            lane=plan.lane,
            step_id=plan.step_id,
            started_s=step.started,
            ended_s=step.ended,
            layout=plan.layout,
            **shape_of(plan)._asdict(),
            wall_s=tuple(one.wall_s for one in stats),
            compute_s=tuple(one.compute_s for one in stats),
            comm_s=tuple(one.comm_s for one in stats),
            exposed_comm_s=tuple(one.exposed_comm_s for one in stats),
            bytes_sent=bytes_sent,
            dense_bytes=self._dense_bytes(step, bytes_sent),
            predicted_s=step.decision.predicted_s,
            density=sparse.kept_pairs / sparse.causal_pairs if sparse.causal_pairs else None,
            recall=sparse.recall_sum / sparse.num_probes if sparse.num_probes else None,
            kv_pages=step.kv_pages,
        )

    def _dense_bytes(self, step: FinishedStep, bytes_sent: Mapping[str, int]) -> int:
        """As counted, where attention was exact; else the formulas' in place of attention's."""
        if not any(work.attention.is_sparse for work in step.plan.work):
            return sum(bytes_sent.values())
        attention = sum(
            self.volumes.exact_prefill(work, step.extents[work.seq_id], self.block_size)
            for work in step.plan.work
        )
        others = sum(bytes_sent.get(kind, 0) for kind in _NOT_ATTENTION)
        return others + self.volumes.config.num_layers * attention


def row_builder(config: ServerConfig, model: ModelConfig) -> RowBuilder:
    """Rows of one server's steps."""
    heads = all_heads(model.num_heads, model.num_kv_heads)
    # Where tensor columns share a KV head, each sends its own copy.
    copies = sum(part.num_kv_heads for part in heads.split(config.setup.tp))
    volumes = Volumes(
        replace(model, num_kv_heads=copies), config.sp, config.setup.dtype.element_bytes
    )
    return RowBuilder(volumes, config.setup.block_size)
