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

from csps.attention.backends import DecodeRows, Merge
from csps.attention.kv import KVStore
from csps.attention.merge import pack, packed_row_bytes
from csps.attention.shards import HelixBatch
from csps.core.heads import AxisHeads
from csps.parallel.collectives import SequenceComm


class Helix:
    """The `Attend` of one decode step in the TP layout; collective over the sequence axis.

    `attend`: the rows that have KV here, in all heads of the axis.
    """

    def __init__(
        self,
        batch: HelixBatch,
        attend: DecodeRows,
        store: KVStore,
        comm: SequenceComm,
        merge: Merge,
        heads: AxisHeads,
    ) -> None:
        self._batch, self._store, self._comm, self._heads = batch, store, comm, heads
        self._attend = attend
        self._merge = merge(batch.held, batch.num_rows, batch.slots_T.device)

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Of own heads; write the new K and V that belong here, attend, o [T, h, D]."""
        q_THD, k_TKD, v_TKD = self._gather(q_THD, k_TKD, v_TKD)
        self._store.write(layer, self._batch.slots_T, k_TKD, v_TKD)
        held_N = self._batch.held_N
        q_NHD = q_THD if held_N is None else q_THD[held_N]
        o_NHD = torch.empty_like(q_NHD)
        lse_NH = q_NHD.new_empty(q_NHD.shape[:2], dtype=torch.float32)
        self._attend(layer, q_NHD, o_NHD, lse_NH)
        return self._return(o_NHD, lse_NH)

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

    def _return(self, o_NHD: Tensor, lse_NH: Tensor) -> Tensor:
        """Every head's partials to its rank; o [T, h, D] of own heads, merged."""
        rank, heads, held = self._comm.rank, self._heads, self._batch.held
        num_heads, head_dim = heads.parts[rank].num_heads, o_NHD.shape[2]
        outgoing = {
            peer: pack(o_NHD[:, heads.queries(peer)], lse_NH[:, heads.queries(peer)])
            for peer in range(self._comm.size)
        }
        mine = outgoing.pop(rank)
        row_bytes = packed_row_bytes(num_heads, head_dim, o_NHD.element_size())
        sizes = [len(rows) for rows in held]
        message_MB = mine.new_empty(sum(sizes), row_bytes)
        incoming = dict(enumerate(message_MB.split(sizes)))
        incoming.pop(rank).copy_(mine)
        self._comm.exchange("partial", outgoing, incoming).wait()
        out_ThD = o_NHD.new_empty(self._batch.num_rows, num_heads, head_dim)
        if num_heads:
            self._merge(message_MB, out_ThD, None)
        return out_ThD
