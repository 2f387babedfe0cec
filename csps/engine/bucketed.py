"""Decode steps in buffers that stay where they are, for a few sizes of batch.

A step runs in the smallest bucket that has room for it (csps.engine.fixed_steps), so that what is
launched is one of few things, and CUDA graphs launch it at once (csps.engine.cuda_graphs).

Suffixes: N rows of a bucket, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from csps.attention.backends import Rotate
from csps.core.plan import Lane, Layout, StepPlan
from csps.engine.batch import SampleRow
from csps.engine.fixed_steps import FixedStep, Tables, fixed_steps
from csps.engine.lane import LaneEngine, LayoutEngine
from csps.engine.placements import HeadsSharded, TokensAttention

Forward = Callable[[], Tensor | None]
# Makes a function of one that only launches kernels, on the same buffers at every call.
Prepare = Callable[[Forward], Forward]


def bucket_sizes(most: int) -> list[int]:
    """Powers of 2 below `most`, and `most`: at most half of a bucket's rows are left over."""
    return [*(1 << power for power in range((most - 1).bit_length())), most]


class BucketedDecode:
    """Steps in which each sequence has one new token."""

    @torch.inference_mode()
    def __init__(
        self,
        placed: TokensAttention | HeadsSharded,
        lane: LaneEngine,
        layouts: Sequence[Layout],
        sizes: Sequence[int],
        prepare: Prepare,
    ) -> None:
        """`sizes`: rows of each bucket, in each of `layouts`. Collective, as the steps are.

        `prepare` is called at once, largest bucket first. The `paged_decode` of the placement's
        kernels must be a FixedDecode.
        """
        self._steps = fixed_steps(placed, lane)
        self._buckets: dict[Layout, list[_Bucket]] = {layout: [] for layout in layouts}
        if lane.sequence.size == 1:  # then all layouts are one
            self._buckets = {layouts[0]: []}
        for num_rows in sorted(sizes, reverse=True):
            for layout, buckets in self._buckets.items():
                step = self._steps.make(layout, num_rows)
                engine = lane.layouts[layout]
                buckets.append(_Bucket(num_rows, step, engine, placed.kernels.rotate, prepare))
        if lane.sequence.size == 1:
            self._buckets = dict.fromkeys(Layout, self._buckets[layouts[0]])

    def takes(self, plan: StepPlan) -> bool:
        """Whether the step is one that `run` can run; the same on every rank."""
        buckets = self._buckets.get(plan.layout)
        return (
            buckets is not None
            and plan.lane is not Lane.PREFILL
            and all(
                work.num_tokens == 1 and work.sample and work.targets is None for work in plan.work
            )
            and self._steps.num_rows(plan) <= buckets[0].num_rows
        )

    def run(self, plan: StepPlan, tables: Tables) -> tuple[Tensor | None, list[SampleRow]]:
        """fp32 logits [rows, V], and whose rows they are; None on ranks that others draw for.

        Overwritten by the next step.
        """
        num_rows = self._steps.num_rows(plan)
        buckets = self._buckets[plan.layout]
        bucket = next(one for one in reversed(buckets) if one.num_rows >= num_rows)
        rows = bucket.step.load(plan, tables)
        logits_NV = bucket.forward()
        return (None if logits_NV is None else logits_NV[: len(rows)]), rows


class _Bucket:
    def __init__(
        self,
        num_rows: int,
        step: FixedStep,
        engine: LayoutEngine,
        rotate: Rotate,
        prepare: Prepare,
    ) -> None:
        self.num_rows, self.step = num_rows, step
        self._engine, self._rotate = engine, rotate
        self.forward = prepare(self._forward)

    def _forward(self) -> Tensor | None:
        """fp32 logits [N, V] of what was loaded last, where `LayoutEngine.logits` has them."""
        model, inputs = self._engine.model, self.step.inputs
        rotate = self._rotate(model.rope_PD, inputs.positions_N, inputs.slots)
        hidden_NE = model(inputs.token_ids_N, inputs.positions_N, inputs.attend, rotate)
        return self._engine.logits(hidden_NE)
