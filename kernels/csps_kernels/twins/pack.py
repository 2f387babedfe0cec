"""What csps_kernels.pack computes, column by column."""

import torch
from torch import Tensor

from csps_kernels.pack import HeadColumns


def pack_heads(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, columns: HeadColumns, own_TWD: Tensor
) -> Tensor:
    """See csps_kernels.pack.pack_heads."""
    side_by_side = torch.cat((q_THD, k_TKD, v_TKD), dim=1)
    message_MD = q_THD.new_empty(len(q_THD) * columns.num_sent, q_THD.shape[2])
    for head, before, width, place in columns.table.tolist():
        _part(message_MD, own_TWD, before, width)[:, place] = side_by_side[:, head]
    return message_MD


def unpack_heads(
    message_MD: Tensor, columns: HeadColumns, own_TWD: Tensor, out_THD: Tensor
) -> None:
    """See csps_kernels.pack.unpack_heads."""
    for head, before, width, place in columns.table.tolist():
        out_THD[:, head] = _part(message_MD, own_TWD, before, width)[:, place]


def pack_partials(o_NHD: Tensor, lse_NH: Tensor, columns: HeadColumns, own_NX: Tensor) -> Tensor:
    """See csps_kernels.pack.pack_partials."""
    o_bytes = o_NHD.shape[2] * o_NHD.element_size()
    num_rows, head_bytes = len(o_NHD), o_bytes + 4
    message_X = own_NX.new_empty(num_rows * columns.num_sent * head_bytes)
    for head, before, width, place in columns.table.tolist():
        part_NX = own_NX
        if before >= 0:
            first, stop = (num_rows * heads * head_bytes for heads in (before, before + width))
            part_NX = message_X[first:stop].view(num_rows, width * head_bytes)
        o_at, lse_at = place * o_bytes, width * o_bytes + place * 4
        part_NX[:, o_at : o_at + o_bytes] = o_NHD[:, head].contiguous().view(torch.uint8)
        lse_N1 = lse_NH[:, head : head + 1]
        part_NX[:, lse_at : lse_at + 4] = lse_N1.contiguous().view(torch.uint8)
    return message_X


def _part(message_MD: Tensor, own_TWD: Tensor, before: int, width: int) -> Tensor:
    """[T, heads, D] of one peer, without a copy."""
    if before < 0:
        return own_TWD
    num_tokens = len(own_TWD)
    part_MD = message_MD[num_tokens * before : num_tokens * (before + width)]
    return part_MD.unflatten(0, (num_tokens, width))
