"""Sequence parallelism by all-to-all (DeepSpeed-Ulysses, arXiv 2309.14509).

Each rank computes q, k, v of its rows for all heads of its row of the mesh. One fused
all-to-all gives every rank all rows of its own heads, attention runs there, a second one
brings the outputs back. Sent per rank and layer: (P - 1)/P (S/P)(2q + k) bytes, where every
KV head has its own rank; ranks that share a KV head each get a copy of its k and v.

Suffixes: T own rows, N rows of all ranks, H, K heads of the mesh row, h, k own heads, D head dim.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from csps.attention.heads import HeadsAttention
from csps.attention.kv import KVSlots
from csps.core.heads import AxisHeads
from csps.parallel.collectives import SequenceComm


class Ulysses:
    """The `Attend` of one step in the SP layout, KV sharded by head; collective over the axis.

    All ranks of the axis project to all of `heads`, and each attends with its own. `slots`: of
    all rows. `bounds`: rank s has rows [bounds[s], bounds[s + 1]) of the step; any of them may be
    empty.
    """

    def __init__(
        self,
        attention: HeadsAttention,
        slots: KVSlots,
        comm: SequenceComm,
        heads: AxisHeads,
        bounds: Sequence[int],
    ) -> None:
        self._attention, self._slots, self._comm = attention, slots, comm
        self._own = heads.parts[comm.rank]
        self._rows = [slice(*pair) for pair in pairwise(bounds)]
        self._num_rows = bounds[-1]
        self._queries = [heads.queries(peer) for peer in range(comm.size)]
        self._keys = [heads.keys(peer) for peer in range(comm.size)]

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Store the K and V of own heads, then attend; o [T, H, D] in q's dtype.

        T may be 0: the other ranks still need this one.
        """
        own, rank = self._own, self._comm.rank
        head_dim = q_THD.shape[2]
        heads = own.num_heads + 2 * own.num_kv_heads
        all_NXD = q_THD.new_empty(self._num_rows, heads, head_dim)
        parts = {
            peer: torch.cat((q_THD[:, queries], k_TKD[:, keys], v_TKD[:, keys]), dim=1)
            for peer, (queries, keys) in enumerate(zip(self._queries, self._keys, strict=True))
        }
        all_NXD[self._rows[rank]] = parts.pop(rank)
        self._exchange(parts, {peer: all_NXD[rows] for peer, rows in enumerate(self._rows)})
        q_NhD, k_NkD, v_NkD = all_NXD.split(
            [own.num_heads, own.num_kv_heads, own.num_kv_heads], dim=1
        )
        if own.num_kv_heads:
            self._slots.store.write(layer, self._slots.slots_T, k_NkD, v_NkD)
        o_NhD = self._attention(layer, q_NhD, k_NkD, v_NkD)

        out_THD = torch.empty_like(q_THD)
        returned = {
            peer: q_THD.new_empty(len(q_THD), queries.stop - queries.start, head_dim)
            for peer, queries in enumerate(self._queries)
        }
        self._exchange({peer: o_NhD[rows] for peer, rows in enumerate(self._rows)}, returned)
        returned[rank] = o_NhD[self._rows[rank]]
        for peer, queries in enumerate(self._queries):
            out_THD[:, queries] = returned[peer]
        return out_THD

    def _exchange(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> None:
        for messages in (outgoing, incoming):
            messages.pop(self._comm.rank, None)
        self._comm.exchange("ulysses", outgoing, incoming).wait()
