"""Sparse prefill of one sequence: one SparseLayer per layer, and what they add up to."""

import numpy as np
import torch
from torch import Tensor

from csps.attention.backends import Kernels
from csps.attention.kv import KVStore
from csps.attention.select import RowSampler
from csps.attention.selection import Choice
from csps.attention.shards import SparseSequence
from csps.attention.sight import Sight
from csps.attention.sparse_context import SparseContext
from csps.attention.sparse_layer import SparseLayer
from csps.attention.transfer import KVShape, micro_partitions
from csps.core.attention import AttentionKind, CsaConfig, Estimate, HeadReport, SparseReport
from csps.parallel.packets import Packets


class SparsePrefill:
    """One sequence of one prefill step; call it once per layer, in order.

    Collective over the ranks that hold blocks of the sequence; the others return at once.
    """

    def __init__(
        self,
        seq: SparseSequence,
        store: KVStore,
        packets: Packets,
        kernels: Kernels,
        config: CsaConfig,
        shape: KVShape,
        *,
        num_kv_heads: int,
        first_head: int,
    ) -> None:
        device = store.flat_keys.device
        sight = Sight(seq, packets.rank, device)
        by_rows = seq.params.kind is AttentionKind.CSA and config.estimate is Estimate.ROWS
        self._context = SparseContext(
            seq=seq,
            sight=sight,
            sampler=RowSampler(
                block_size=seq.block_size,
                num_kv_heads=num_kv_heads,
                group_size=shape.group_size,
                rows_per_tile=config.rows_per_tile if by_rows else 0,
                seed=seq.params.seed,
                device=device,
            ),
            store=store,
            packets=packets,
            kernels=kernels,
            config=config,
            shape=shape,
            num_kv_heads=num_kv_heads,
            first_head=first_head,
            partitions=micro_partitions(num_kv_heads, len(sight.ranks)),
            last_owner=next((r for r in sight.ranks if seq.last_tile in seq.tiles[r]), -1),
        )
        self.choice: Choice | None = None  # of the last layer called
        self._fetched_blocks = self._num_layers = 0
        self._kept_pairs = torch.zeros((), dtype=torch.int64, device=device)  # by choice
        self._heads: list[HeadReport] = []
        self._recalls: list[np.ndarray] = []

    def __call__(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, out_THD: Tensor
    ) -> None:
        """Fill the sequence's rows of `out_THD`; its K and V are in the store already."""
        if not self.is_active:
            return
        context = self._context
        choice, num_fetched = SparseLayer(context, layer, q_THD, k_TKD, v_TKD).run(out_THD)
        self.choice = choice
        self._kept_pairs += choice.keep.sum()
        self._fetched_blocks += num_fetched
        self._num_layers += 1
        self._heads += choice.verdict.reports
        self._recalls.append(choice.verdict.recalls)

    @property
    def may_probe(self) -> np.ndarray:
        """Rows of a tile that measure recall: bool [G, B]."""
        return self._context.sampler.may_probe

    @property
    def is_active(self) -> bool:
        """Whether this rank holds blocks of the sequence."""
        return self._context.me in self._context.sight.ranks

    def report(self) -> SparseReport:
        """What the layers so far kept, fetched and recalled."""
        context, seq = self._context, self._context.seq
        per_layer = context.num_kv_heads * self._num_layers
        remote = sum(len(seq.blocks[peer]) for peer in context.peers)
        # Without a probe (a prompt of one tile) nothing was approximated.
        recalls = np.concatenate([*self._recalls, np.ones(0)])
        exact = seq.last_tile + 1 if context.last_owner == context.me else 0
        return SparseReport(
            seq_id=seq.seq_id,
            kept_pairs=int(self._kept_pairs) + exact * per_layer,
            causal_pairs=int((seq.tiles[context.me] + 1).sum()) * per_layer,
            fetched_blocks=self._fetched_blocks,
            remote_blocks=remote * per_layer,
            recall_p5=float(np.quantile(recalls, 0.05)) if recalls.size else 1.0,
            heads=tuple(self._heads) if context.sight.ranks[0] == context.me else (),
        )
