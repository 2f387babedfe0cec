"""Attention of one prefill step: dense sequences by ring or pass-Q, sparse ones in three phases."""

import torch
from torch import Tensor

from csps.attention.backends import Kernels
from csps.attention.kv import KVStore
from csps.attention.pass_q import PassQ, ships_queries
from csps.attention.ring import RingPrefill
from csps.attention.shards import PrefillBatch
from csps.attention.sparse import SparsePrefill
from csps.attention.transfer import KVShape
from csps.core.attention import CsaConfig, SparseReport
from csps.parallel.collectives import SequenceComm
from csps.parallel.packets import Packets


class PrefillAttention:
    """The `Attend` of one prefill step. Collective where any sequence spans ranks."""

    def __init__(
        self,
        batch: PrefillBatch,
        store: KVStore,
        comm: SequenceComm,
        kernels: Kernels,
        config: CsaConfig,
        shape: KVShape,
        *,
        num_kv_heads: int,
        first_head: int,
    ) -> None:
        shipped = [seq for seq in batch.sequences if ships_queries(seq, shape)]
        others = [seq for seq in batch.sequences if not ships_queries(seq, shape)]
        self._pass_q = (
            PassQ(shipped, store, comm, kernels, batch.slots_T.device) if shipped else None
        )
        self._ring = RingPrefill(others, store, comm, kernels.partial) if others else None
        packets = Packets(comm, eager=not config.pipeline)
        self.sparse = [
            SparsePrefill(
                seq,
                store,
                packets,
                kernels,
                config,
                shape,
                num_kv_heads=num_kv_heads,
                first_head=first_head,
            )
            for seq in batch.sparse
        ]

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """o [T, H, D] in q's dtype; the new K and V are stored already."""
        if self._ring is None:
            out_THD = torch.empty_like(q_THD)
        else:
            out_THD = self._ring(layer, q_THD, k_TKD.shape[1])
        if self._pass_q is not None:
            self._pass_q(layer, q_THD, k_TKD, v_TKD, out_THD)
        for sequence in self.sparse:
            sequence(layer, q_THD, k_TKD, v_TKD, out_THD)
        return out_THD

    def reports(self) -> tuple[SparseReport, ...]:
        """Of the sparse sequences this rank holds any block of."""
        return tuple(sequence.report() for sequence in self.sparse if sequence.is_active)
