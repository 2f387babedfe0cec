"""Decode steps of one rank in buffers that stay where they are, for a few sizes of batch.

A step runs in the smallest bucket that has room for it. Rows that are left over write their K and
V to the pool's scratch page, see no key, and nobody draws from them. So what is launched is the
same at every step, and CUDA graphs launch it at once (csps.engine.cuda_graphs).

Suffixes: N rows of a bucket, H, K heads, D head dim, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from csps.attention.backends import FixedDecode, Kernels
from csps.attention.kv import KVSlots
from csps.core.plan import Lane, StepPlan
from csps.engine.block_table import BlockTable
from csps.engine.kv_pool import KVPool
from csps.engine.lane import LayoutEngine
from csps.parallel.upload import refill

# Makes a function of one that only launches kernels, on the same buffers at every call.
Prepare = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def bucket_sizes(most: int) -> list[int]:
    """Powers of 2 below `most`, and `most`: at most half of a bucket's rows are left over."""
    return [*(1 << power for power in range((most - 1).bit_length())), most]


class BucketedDecode:
    """Steps in which each sequence has one new token, on a rank that is alone."""

    @torch.inference_mode()
    def __init__(
        self,
        layout: LayoutEngine,
        pool: KVPool,
        kernels: Kernels,
        sizes: Sequence[int],
        device: torch.device,
        prepare: Prepare,
    ) -> None:
        """`sizes`: rows of each bucket. `prepare` is called at once, largest first.

        `kernels.paged_decode` must be a FixedDecode.
        """
        assert layout.comm.size == 1, "its transfers would have to be in the graphs"
        self._buckets = []
        for num_rows in sorted(sizes, reverse=True):
            bucket = _Bucket(layout, pool, kernels, num_rows, device)
            self._buckets.append((bucket, prepare(bucket.forward)))

    def takes(self, plan: StepPlan) -> bool:
        """Whether the step is one that `logits` can run."""
        return (
            plan.lane is not Lane.PREFILL
            and len(plan.work) <= self._buckets[0][0].num_rows
            and all(
                work.num_tokens == 1 and work.sample and work.targets is None for work in plan.work
            )
        )

    def logits(self, plan: StepPlan, tables: Mapping[int, BlockTable]) -> Tensor:
        """fp32 [sequences, V], in plan order; overwritten by the next step."""
        num_rows = len(plan.work)
        bucket, forward = next(
            one for one in reversed(self._buckets) if one[0].num_rows >= num_rows
        )
        bucket.load(plan, tables)
        return forward()[:num_rows]


class _Bucket:
    def __init__(
        self,
        layout: LayoutEngine,
        pool: KVPool,
        kernels: Kernels,
        num_rows: int,
        device: torch.device,
    ) -> None:
        self.num_rows = num_rows
        self._layout, self._pool, self._rotate = layout, pool, kernels.rotate
        assert isinstance(kernels.paged_decode, FixedDecode)
        self._rows = kernels.paged_decode.fixed(pool, num_rows)
        self._none_3N = np.zeros((3, num_rows), dtype=np.int64)
        self._none_3N[2] = pool.scratch_slot
        # Token ids, positions, slots.
        self._inputs_3N = torch.from_numpy(self._none_3N).to(device, copy=True)

    def load(self, plan: StepPlan, tables: Mapping[int, BlockTable]) -> None:
        inputs_3N, shards = self._none_3N.copy(), []
        for row, work in enumerate(plan.work):
            table = tables[work.seq_id]
            (slot,) = table.slots(work.start, work.stop)
            inputs_3N[:, row] = work.token_ids[0], work.start, slot
            shards.append(table.runs(0, work.stop))
        refill(self._inputs_3N, inputs_3N)
        self._rows.load(shards)

    def forward(self) -> Tensor:
        """fp32 logits [N, V] of what was loaded last."""
        token_ids_N, positions_N, slots_N = self._inputs_3N

        def attend(layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
            o_NHD = torch.empty_like(q_NHD)
            self._rows(layer, q_NHD, o_NHD, o_NHD.new_empty(o_NHD.shape[:2], dtype=torch.float32))
            return o_NHD

        model = self._layout.model
        rotate = self._rotate(model.rope_PD, positions_N, KVSlots(self._pool, slots_N))
        hidden_NE = model(token_ids_N, positions_N, attend, rotate)
        logits_NV = self._layout.logits(hidden_NE)
        assert logits_NV is not None, "the first rank has them"
        return logits_NV
