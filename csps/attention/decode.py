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
from csps.attention.merge import merge_into, pack, packed_row_bytes, unpack
from csps.attention.runs import attend_runs
from csps.attention.shards import DecodeBatch, Run
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
        batch, comm = self._batch, self._comm
        num_heads, head_dim = q_THD.shape[1:]
        asked = {
            peer: q_THD.new_empty(len(shards), num_heads, head_dim)
            for peer, shards in batch.answered.items()
        }
        shipped = {peer: q_THD[rows] for peer, rows in batch.shipped.items()}
        queries = comm.exchange("query", shipped, asked)
        self._store.write(layer, batch.slots_T, k_TKD, v_TKD)
        acc_THD, lse_TH = self._attend(layer, q_THD, batch.shards)
        queries.wait()

        answers = {
            peer: pack(*self._attend(layer, q_NHD, batch.answered[peer], like=q_THD))
            for peer, q_NHD in asked.items()
        }
        row_bytes = packed_row_bytes(num_heads, head_dim, q_THD.element_size())
        replies = {
            peer: q_THD.new_empty(len(rows), row_bytes, dtype=torch.uint8)
            for peer, rows in batch.shipped.items()
        }
        comm.exchange("partial", answers, replies).wait()
        for peer, message in replies.items():
            rows = batch.shipped[peer]
            o_NHD, part_NH = unpack(message, num_heads, head_dim, q_THD.dtype)
            merged_NHD, merged_NH = acc_THD[rows], lse_TH[rows]
            merge_into(merged_NHD, merged_NH, o_NHD, part_NH)
            acc_THD[rows], lse_TH[rows] = merged_NHD, merged_NH
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
