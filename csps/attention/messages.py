"""Messages between ranks, by torch: those of one peer after another.

Suffixes: T tokens, N rows, H, K all heads of the axis, h, k heads of one rank, W its queries, keys
and values side by side, M heads of messages, all tokens', D head dim, B bytes.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from csps.attention.merge import pack
from csps.core.heads import AxisHeads


def by_peer(rows: Tensor, sizes: Mapping[int, int]) -> dict[int, Tensor]:
    """Rows of each peer, which lie behind one another, without a copy."""
    return dict(zip(sizes, rows.split(list(sizes.values())), strict=True)) if sizes else {}


class HeadMessages:
    """See csps.attention.backends.HeadMessages."""

    def __init__(self, heads: AxisHeads, rank: int, device: torch.device) -> None:
        """`device` is where tables would be: here are none."""
        self._rank = rank
        self._num_heads = [part.num_heads for part in heads.parts]
        self._num_qkv_heads = [part.num_qkv_heads for part in heads.parts]
        self._queries = [heads.queries(peer) for peer in range(len(heads.parts))]
        self._keys = [heads.keys(peer) for peer in range(len(heads.parts))]
        # Whose heads all queries, keys and values are taken from.
        self._side_by_side = _side_by_side(heads)

    def pack_qkv(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, own_TWD: Tensor
    ) -> dict[int, Tensor]:
        parts: dict[int, Tensor] = {}
        for peer, (queries, keys) in enumerate(zip(self._queries, self._keys, strict=True)):
            side_by_side = q_THD[:, queries], k_TKD[:, keys], v_TKD[:, keys]
            out = own_TWD if peer == self._rank else None
            parts[peer] = torch.cat(side_by_side, dim=1, out=out)
        del parts[self._rank]
        return parts

    def own_qkv(self, q_ThD: Tensor, k_TkD: Tensor, v_TkD: Tensor) -> Tensor:
        return torch.cat((q_ThD, k_TkD, v_TkD), dim=1)

    def unpack_qkv(self, received_MD: Tensor, own_TWD: Tensor) -> Tensor:
        parts = self._all(received_MD, own_TWD, self._num_qkv_heads)
        taken = [parts[peer][:, heads] for peer, heads in self._side_by_side]
        return torch.cat(taken, dim=1) if taken else own_TWD

    def pack_partials(self, o_NHD: Tensor, lse_NH: Tensor, own_NB: Tensor) -> dict[int, Tensor]:
        parts: dict[int, Tensor] = {}
        for peer, queries in enumerate(self._queries):
            out = own_NB if peer == self._rank else None
            parts[peer] = pack(o_NHD[:, queries], lse_NH[:, queries], out)
        del parts[self._rank]
        return parts

    def unpack_outputs(self, received_MD: Tensor, own_ThD: Tensor) -> Tensor:
        return torch.cat(self._all(received_MD, own_ThD, self._num_heads), dim=1)

    def _all(self, received_MD: Tensor, own_TWD: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """[T, width, D] of every rank, without a copy."""
        num_tokens, _, head_dim = own_TWD.shape
        parts: list[Tensor] = []
        stop = 0
        for peer, width in enumerate(widths):
            if peer == self._rank:
                parts.append(own_TWD)
                continue
            first, stop = stop, stop + num_tokens * width
            parts.append(received_MD[first:stop].view(num_tokens, width, head_dim))
        return parts


def _side_by_side(heads: AxisHeads) -> list[tuple[int, slice]]:
    """(rank, heads of its W) that are all queries, then all keys, then all values.

    Ranks that share a KV head are neighbours: it is the first one's.
    """
    queries: list[tuple[int, slice]] = []
    keys: list[tuple[int, slice]] = []
    values: list[tuple[int, slice]] = []
    num_taken = 0  # KV heads of the axis
    for peer, part in enumerate(heads.parts):
        if not part.num_heads:
            continue
        queries.append((peer, slice(0, part.num_heads)))
        own = heads.keys(peer)
        skipped = max(num_taken - own.start, 0)
        num_taken = own.stop
        if skipped < part.num_kv_heads:
            first, behind = part.num_heads, part.num_heads + part.num_kv_heads
            keys.append((peer, slice(first + skipped, behind)))
            values.append((peer, slice(behind + skipped, behind + part.num_kv_heads)))
    return queries + keys + values
