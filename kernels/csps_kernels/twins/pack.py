"""What csps_kernels.pack computes, peer by peer and part by part."""

import torch
from torch import Tensor

from csps_kernels.pack import HeadColumns


def pack_partials(o_THD: Tensor, lse_TH: Tensor, rows_N: Tensor, dtype: torch.dtype) -> Tensor:
    """See csps_kernels.pack.pack_partials."""
    parts = o_THD[rows_N].to(dtype).flatten(1), lse_TH[rows_N]
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)


def unpack_partials(
    message_NX: Tensor, rows_N: Tensor, dtype: torch.dtype, o_THD: Tensor, lse_TH: Tensor
) -> None:
    """See csps_kernels.pack.unpack_partials."""
    split = message_NX.shape[1] - 4 * lse_TH.shape[1]
    part_NX = message_NX[:, :split].contiguous().view(dtype)
    o_THD[rows_N] = part_NX.unflatten(1, o_THD.shape[1:]).to(o_THD.dtype)
    lse_TH[rows_N] = message_NX[:, split:].contiguous().view(torch.float32)


def pack_heads(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, columns: HeadColumns) -> Tensor:
    """See csps_kernels.pack.pack_heads."""
    side_by_side = torch.cat((q_THD, k_TKD, v_TKD), dim=1)
    messages = [side_by_side[:, heads].flatten(0, 1) for heads in _heads_by_peer(columns)]
    return torch.cat(messages) if messages else q_THD.new_empty(0, q_THD.shape[2])


def unpack_heads(message: Tensor, columns: HeadColumns, out_THD: Tensor) -> None:
    """See csps_kernels.pack.unpack_heads."""
    num_tokens = len(out_THD)
    parts = message.split([num_tokens * width for width in columns.widths])
    for heads, part in zip(_heads_by_peer(columns), parts, strict=True):
        out_THD[:, heads] = part.unflatten(0, (num_tokens, len(heads)))


def _heads_by_peer(columns: HeadColumns) -> list[Tensor]:
    return list(columns.table[:, 0].long().split(list(columns.widths)))
