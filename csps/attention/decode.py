"""Decode over sharded KV: queries travel to the KV, (o, lse) comes back, KV never moves.

Per layer: the master of a row ships q to the other holders of the sequence's KV, each
answers with its partial output and log-sum-exp in one packed message, the master merges
(multi-master decode of LoongServe, arXiv 2404.09526). A token whose KV lies on P ranks costs
(P - 1)(2q + 4 Hq) bytes per layer, where q = Hq * D * e.

Suffixes: T rows, N shipped rows, H query heads, K KV heads, D head dim.
"""

import torch
from torch import Tensor

from csps.attention.backends import Partial
from csps.attention.kv import KVStore
from csps.attention.runs import attend_runs
from csps.attention.shards import DecodeBatch, Run
from csps.attention.ship import ship_queries
from csps.parallel.collectives import SequenceComm


class QueryShip:
    """The `Attend` of one decode step. Ranks that share no sequence do not speak."""

    def __init__(
        self, batch: DecodeBatch, store: KVStore, comm: SequenceComm, partial: Partial
    ) -> None:
        self._batch = batch
        self._store = store
        self._comm = comm
        self._partial = partial

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Write the new K and V, then attend; o [T, H, D] in q's dtype. T may be 0."""
        batch = self._batch

        def attend_here() -> tuple[Tensor, Tensor]:
            self._store.write(layer, batch.slots_T, k_TKD, v_TKD)
            return self._attend(layer, q_THD, batch.shards)

        acc_THD = ship_queries(
            self._comm,
            q_THD,
            batch.shipped,
            {peer: len(shards) for peer, shards in batch.answered.items()},
            attend_here,
            lambda peer, q_NHD: self._attend(layer, q_NHD, batch.answered[peer], like=q_THD),
        )
        return acc_THD.to(q_THD.dtype)

    def _attend(
        self,
        layer: int,
        q_NHD: Tensor,
        shards: tuple[tuple[Run, ...], ...],
        like: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Each row over its own shard: (o [N, H, D], lse [N, H] fp32).

        o is fp32, or of `like`'s dtype: partial outputs travel in the model's dtype.
        """
        dtype = torch.float32 if like is None else like.dtype
        o_NHD = torch.empty(q_NHD.shape, dtype=dtype, device=q_NHD.device)
        lse_NH = torch.empty(q_NHD.shape[:2], dtype=torch.float32, device=q_NHD.device)
        for row, runs in enumerate(shards):
            one = slice(row, row + 1)
            o_NHD[one], lse_NH[one] = attend_runs(
                self._partial, self._store, layer, q_NHD[one], runs
            )
        return o_NHD, lse_NH
