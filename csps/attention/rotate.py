"""Rotary embedding of new queries and keys; their K and V are stored on the way.

cos and sin come from a table of all positions (csps.model.rope). Suffixes: P positions, T tokens,
H query heads, K KV heads, G query heads per KV head, D head dim (even).
"""

import torch
from torch import Tensor

from csps.attention.backends import RotateRows
from csps.attention.kv import KVSlots


def rotation(table_PD: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """What `rotate` needs for tokens at `positions_T` (int64): two fp32 [T, 1, 1, D].

    The second one is sin with its first half negated: rotate adds it to the swapped halves.
    Made once per forward pass and shared by all layers.
    """
    cos, sin = table_PD[positions_T].chunk(2, dim=-1)
    doubled = torch.cat((cos, cos), dim=-1)
    signed = torch.cat((-sin, sin), dim=-1)
    return doubled[:, None, None], signed[:, None, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last dimension of `x` [T, A, B, D], half-split convention; returns fp32.

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), in four operations: at one token it is
    their number that costs (measured 14 us, against 22 for chunk, multiply and cat).
    """
    x32 = x.float()
    swapped = x32.roll(x.shape[-1] // 2, -1)
    return (x32 * cos).addcmul_(swapped, sin)


def rotate_rows(table_PD: Tensor, positions_T: Tensor, slots: KVSlots | None = None) -> RotateRows:
    """See csps.attention.backends.Rotate: in torch, an operation at a time."""
    cos, sin = rotation(table_PD, positions_T)

    def run(layer: int, qk_TKGD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor]:
        rotated = rotate(qk_TKGD, cos, sin)
        q_THD = rotated[:, :, :-1].to(v_TKD.dtype).flatten(1, 2).contiguous()
        k_TKD = rotated[:, :, -1].to(v_TKD.dtype).contiguous()
        if slots is not None:
            slots.store.write(layer, slots.slots_T, k_TKD, v_TKD)
        return q_THD, k_TKD

    return run
