"""Decode with weights split over all ranks and KV by token range.

Every rank has all new tokens, but projects to its own heads only. Per layer its q, k and v go to
the other ranks of the axis, so that each attends with all heads over its shard; (o, lse) of each
head go back to the rank that has the head, which merges them. The linear layers around it sum
over all ranks. (Helix Parallelism, arXiv 2507.07120, section 2.)

Sent per rank, layer and token that all P ranks hold KV of: (P - 1)/P of (q + P k' + q + 4 Hq)
bytes, k' being k and v of one rank's heads.

Suffixes: T tokens, H, K all heads of the axis, h, k own heads, N rows, D head dim.
"""

import torch
from torch import Tensor

from csps.attention.backends import Partial
from csps.attention.kv import KVStore
from csps.attention.merge import merge_into, pack, packed_row_bytes, unpack
from csps.attention.runs import attend_runs
from csps.attention.shards import HelixBatch
from csps.core.heads import AxisHeads
from csps.parallel.collectives import SequenceComm


class Helix:
    """The `Attend` of one decode step in the TP layout; collective over the sequence axis."""

    def __init__(
        self,
        batch: HelixBatch,
        store: KVStore,
        comm: SequenceComm,
        partial: Partial,
        heads: AxisHeads,
    ) -> None:
        self._batch, self._store, self._comm, self._partial = batch, store, comm, partial
        self._heads = heads

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Of own heads; write the new K and V that belong here, attend, o [T, h, D]."""
        q_THD, k_TKD, v_TKD = self._gather(q_THD, k_TKD, v_TKD)
        batch = self._batch
        written = batch.written_T
        self._store.write(layer, batch.slots_T, k_TKD[written], v_TKD[written])
        held = batch.held[self._comm.rank]
        o_NHD = q_THD.new_empty(len(held), *q_THD.shape[1:])
        lse_NH = torch.empty(o_NHD.shape[:2], dtype=torch.float32, device=o_NHD.device)
        for index, (row, runs) in enumerate(zip(held.tolist(), batch.shards, strict=True)):
            here = slice(index, index + 1)
            o_NHD[here], lse_NH[here] = attend_runs(
                self._partial, self._store, layer, q_THD[row : row + 1], runs
            )
        return self._return(o_NHD, lse_NH, q_THD.shape[0])

    def _gather(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H, D], k and v [T, K, D] of all heads, from everyone's own."""
        rank, heads = self._comm.rank, self._heads
        num_tokens, _, head_dim = q.shape
        own = torch.cat((q, k, v), dim=1)
        parts = {
            peer: own
            if peer == rank
            else q.new_empty(num_tokens, part.num_heads + 2 * part.num_kv_heads, head_dim)
            for peer, part in enumerate(heads.parts)
        }
        incoming = {peer: part for peer, part in parts.items() if peer != rank}
        self._comm.exchange("query", dict.fromkeys(incoming, own), incoming).wait()
        resident = heads.resident
        q_THD = q.new_empty(num_tokens, resident.num_heads, head_dim)
        kv_2TKD = q.new_empty(2, num_tokens, resident.num_kv_heads, head_dim)
        for peer, part in parts.items():
            num_heads, num_kv = heads.parts[peer].num_heads, heads.parts[peer].num_kv_heads
            q_THD[:, heads.queries(peer)] = part[:, :num_heads]
            kv_2TKD[0, :, heads.keys(peer)] = part[:, num_heads : num_heads + num_kv]
            kv_2TKD[1, :, heads.keys(peer)] = part[:, num_heads + num_kv :]
        return q_THD, kv_2TKD[0], kv_2TKD[1]

    def _return(self, o_NHD: Tensor, lse_NH: Tensor, num_tokens: int) -> Tensor:
        """Every head's partials to its rank; o [T, h, D] of own heads, merged."""
        rank, heads, held = self._comm.rank, self._heads, self._batch.held
        num_heads, head_dim = heads.parts[rank].num_heads, o_NHD.shape[2]
        row_bytes = packed_row_bytes(num_heads, head_dim, o_NHD.element_size())
        outgoing = {
            peer: pack(o_NHD[:, heads.queries(peer)], lse_NH[:, heads.queries(peer)])
            for peer in range(self._comm.size)
        }
        mine = outgoing.pop(rank)
        incoming = {
            peer: mine.new_empty(len(rows), row_bytes)
            for peer, rows in enumerate(held)
            if peer != rank
        }
        self._comm.exchange("partial", outgoing, incoming).wait()
        incoming[rank] = mine
        shape = (num_tokens, num_heads, head_dim)
        acc_ThD = torch.zeros(shape, dtype=torch.float32, device=o_NHD.device)
        lse_Th = acc_ThD.new_full(shape[:2], -torch.inf)
        for peer in range(self._comm.size):
            rows = held[peer]
            part_NhD, part_Nh = unpack(incoming[peer], num_heads, head_dim, o_NHD.dtype)
            merged_NhD, merged_Nh = acc_ThD[rows], lse_Th[rows]
            merge_into(merged_NhD, merged_Nh, part_NhD, part_Nh)
            acc_ThD[rows], lse_Th[rows] = merged_NhD, merged_Nh
        return acc_ThD.to(o_NHD.dtype)
