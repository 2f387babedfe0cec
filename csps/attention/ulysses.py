"""Sequence parallelism by all-to-all (DeepSpeed-Ulysses, arXiv 2309.14509).

Each rank computes q, k, v of its rows for all heads of its row of the mesh. One fused
all-to-all gives every rank all rows of its own heads, attention runs there, a second one
brings the outputs back. Sent per rank and layer: (P - 1)/P (S/P)(2q + k) bytes, where every
KV head has its own rank; ranks that share a KV head each get a copy of its k and v.

Suffixes: T own rows, N rows of all ranks, H, K heads of the mesh row, h, k own heads,
W h + 2 k, M heads of messages, all rows', D head dim.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from csps.attention.backends import HeadMessages
from csps.attention.heads import HeadsAttention
from csps.attention.kv import KVSlots
from csps.attention.messages import by_peer
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
        messages: HeadMessages,
        bounds: Sequence[int],
    ) -> None:
        self._attention, self._slots, self._comm = attention, slots, comm
        self._messages, self._own = messages, heads.parts[comm.rank]
        self._rows = [slice(*pair) for pair in pairwise(bounds)]
        self._num_rows = bounds[-1]
        # Of each other rank.
        self._num_heads = {
            peer: part.num_heads for peer, part in enumerate(heads.parts) if peer != comm.rank
        }

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Store the K and V of own heads, then attend; o [T, H, D] in q's dtype.

        T may be 0: the other ranks still need this one.
        """
        own, own_rows, messages = self._own, self._rows[self._comm.rank], self._messages
        num_tokens, _, head_dim = q_THD.shape
        all_NWD = q_THD.new_empty(self._num_rows, own.num_qkv_heads, head_dim)
        outgoing = messages.pack_qkv(q_THD, k_TKD, v_TKD, all_NWD[own_rows])
        self._comm.exchange("ulysses", outgoing, self._by_rows(all_NWD)).wait()
        q_NhD, k_NkD, v_NkD = all_NWD.split(
            [own.num_heads, own.num_kv_heads, own.num_kv_heads], dim=1
        )
        if own.num_kv_heads:
            self._slots.store.write(layer, self._slots.slots_T, k_NkD, v_NkD)
        o_NhD = self._attention(layer, q_NhD, k_NkD, v_NkD)

        sizes = {peer: num_tokens * heads for peer, heads in self._num_heads.items()}
        received_MD = q_THD.new_empty(sum(sizes.values()), head_dim)
        incoming = by_peer(received_MD, sizes)
        self._comm.exchange("ulysses", self._by_rows(o_NhD), incoming).wait()
        return messages.unpack_outputs(received_MD, o_NhD[own_rows])

    def _by_rows(self, all_NXD: Tensor) -> dict[int, Tensor]:
        """Of each other rank's rows, without a copy."""
        return {peer: all_NXD[self._rows[peer]] for peer in self._num_heads}
