"""Decode with weights split over all ranks and KV by token range.

Every rank has all new tokens, but projects to its own heads only. Per layer its q, k and v go to
the other ranks of the axis, so that each attends with all heads over its shard; (o, lse) of each
head go back to the rank that has the head, which merges them. The linear layers around it sum
over all ranks. (Helix Parallelism, arXiv 2507.07120, section 2.)

Sent per rank, layer and token that all P ranks hold KV of: (P - 1)/P of (q + P k' + q + 4 Hq)
bytes, k' being k and v of one rank's heads.

Suffixes: T tokens, H, K all heads of the axis, h, k own heads, W h + 2 k, N rows, M heads of
messages, all tokens', or rows of partial outputs, D head dim, B bytes.
"""

import torch
from torch import Tensor

from csps.attention.backends import DecodeRows, HeadMessages, Merge
from csps.attention.kv import KVStore
from csps.attention.merge import packed_row_bytes
from csps.attention.messages import by_peer
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
        messages: HeadMessages,
    ) -> None:
        self._batch, self._store, self._comm, self._heads = batch, store, comm, heads
        self._attend, self._messages = attend, messages
        self._peers = [peer for peer in range(comm.size) if peer != comm.rank]
        self._merge = merge(batch.held, batch.num_rows, batch.slots_T.device)

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Of own heads; write the new K and V that belong here, attend, o [T, h, D]."""
        q_THD, k_TKD, v_TKD = self._gather(q_THD, k_TKD, v_TKD)
        self._store.write(layer, self._batch.slots_T, k_TKD, v_TKD)
        held_N = self._batch.held_N
        q_NHD = q_THD if held_N is None else q_THD[held_N]
        o_NHD = q_NHD.new_empty(q_NHD.shape)
        lse_NH = q_NHD.new_empty(q_NHD.shape[:2], dtype=torch.float32)
        self._attend(layer, q_NHD, o_NHD, lse_NH)
        return self._return(o_NHD, lse_NH)

    def _gather(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H, D], k and v [T, K, D] of all heads, from everyone's own."""
        own_TWD = self._messages.own_qkv(q, k, v)
        num_tokens, _, head_dim = own_TWD.shape
        parts, resident = self._heads.parts, self._heads.resident
        sizes = {peer: num_tokens * parts[peer].num_qkv_heads for peer in self._peers}
        received_MD = q.new_empty(sum(sizes.values()), head_dim)
        outgoing = dict.fromkeys(self._peers, own_TWD)
        self._comm.exchange("query", outgoing, by_peer(received_MD, sizes)).wait()
        all_TXD = self._messages.unpack_qkv(received_MD, own_TWD)
        counts = [resident.num_heads, resident.num_kv_heads, resident.num_kv_heads]
        q_THD, k_TKD, v_TKD = all_TXD.split(counts, dim=1)
        return q_THD, k_TKD, v_TKD

    def _return(self, o_NHD: Tensor, lse_NH: Tensor) -> Tensor:
        """Every head's partials to its rank; o [T, h, D] of own heads, merged."""
        num_heads, head_dim = self._heads.parts[self._comm.rank].num_heads, o_NHD.shape[2]
        row_bytes = packed_row_bytes(num_heads, head_dim, o_NHD.element_size())
        sizes = [len(rows) for rows in self._batch.held]
        message_MB = o_NHD.new_empty(sum(sizes), row_bytes, dtype=torch.uint8)
        incoming = dict(enumerate(message_MB.split(sizes)))
        own_NB = incoming.pop(self._comm.rank)
        outgoing = self._messages.pack_partials(o_NHD, lse_NH, own_NB)
        self._comm.exchange("partial", outgoing, incoming).wait()
        out_ThD = o_NHD.new_empty(self._batch.num_rows, num_heads, head_dim)
        if num_heads:
            self._merge(message_MB, out_ThD, None)
        return out_ThD
