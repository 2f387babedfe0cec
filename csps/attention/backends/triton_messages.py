"""Messages by head by csps_kernels.pack, for the triton backend: one launch each.

Suffixes as of csps.attention.messages.
"""

import itertools

import torch
from torch import Tensor

from csps.attention.merge import packed_row_bytes
from csps.attention.messages import by_peer
from csps.core.heads import AxisHeads
from csps_kernels.pack import head_columns, pack_heads, pack_partials, unpack_heads


class HeadMessages:
    """See csps.attention.backends.HeadMessages."""

    def __init__(self, heads: AxisHeads, rank: int, device: torch.device) -> None:
        parts, resident = heads.parts, heads.resident
        self._num_heads, self._num_qkv_heads = resident.num_heads, resident.num_qkv_heads
        self._num_own = parts[rank].num_qkv_heads
        peers = [peer for peer in range(len(parts)) if peer != rank]
        self._qkv_heads = {peer: parts[peer].num_qkv_heads for peer in peers}
        self._heads = {peer: parts[peer].num_heads for peer in peers}
        queries = [_range(heads.queries(peer)) for peer in range(len(parts))]
        keys = [_range(heads.keys(peer), resident.num_heads) for peer in range(len(parts))]
        values = [[head + resident.num_kv_heads for head in of_peer] for of_peer in keys]
        qkv = [[*itertools.chain(*of_peer)] for of_peer in zip(queries, keys, values, strict=True)]
        self._pack_qkv = head_columns(qkv, rank, device)
        self._unpack_qkv = head_columns(qkv, rank, device, once=True)
        self._queries = head_columns(queries, rank, device)
        self._own_qkv = head_columns([range(self._num_own)], 0, device)

    def pack_qkv(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, own_TWD: Tensor
    ) -> dict[int, Tensor]:
        message_MD = pack_heads(q_THD, k_TKD, v_TKD, self._pack_qkv, own_TWD)
        return by_peer(message_MD, _times(self._qkv_heads, len(q_THD)))

    def own_qkv(self, q_ThD: Tensor, k_TkD: Tensor, v_TkD: Tensor) -> Tensor:
        num_tokens, _, head_dim = q_ThD.shape
        own_TWD = q_ThD.new_empty(num_tokens, self._num_own, head_dim)
        pack_heads(q_ThD, k_TkD, v_TkD, self._own_qkv, own_TWD)
        return own_TWD

    def unpack_qkv(self, received_MD: Tensor, own_TWD: Tensor) -> Tensor:
        num_tokens, _, head_dim = own_TWD.shape
        out_TXD = own_TWD.new_empty(num_tokens, self._num_qkv_heads, head_dim)
        unpack_heads(received_MD, self._unpack_qkv, own_TWD, out_TXD)
        return out_TXD

    def pack_partials(self, o_NHD: Tensor, lse_NH: Tensor, own_NB: Tensor) -> dict[int, Tensor]:
        message_B = pack_partials(o_NHD, lse_NH, self._queries, own_NB)
        head_bytes = packed_row_bytes(1, o_NHD.shape[2], o_NHD.element_size())
        return by_peer(message_B, _times(self._heads, len(o_NHD) * head_bytes))

    def unpack_outputs(self, received_MD: Tensor, own_ThD: Tensor) -> Tensor:
        num_tokens, _, head_dim = own_ThD.shape
        out_THD = own_ThD.new_empty(num_tokens, self._num_heads, head_dim)
        unpack_heads(received_MD, self._queries, own_ThD, out_THD)
        return out_THD


def _range(heads: slice, offset: int = 0) -> list[int]:
    return list(range(offset + heads.start, offset + heads.stop))


def _times(heads_by_peer: dict[int, int], count: int) -> dict[int, int]:
    return {peer: num_heads * count for peer, num_heads in heads_by_peer.items()}
