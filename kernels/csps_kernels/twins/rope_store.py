"""What csps_kernels.rope_store computes, an operation at a time."""

import torch
from torch import Tensor


def rope_store(
    qk_TKHD: Tensor,
    v_TKD: Tensor,
    table_PD: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    keys_KSD: Tensor,
    values_KSD: Tensor,
) -> Tensor:
    """See csps_kernels.rope_store.rope_store."""
    cos, sin = table_PD[positions_T][:, None, None].chunk(2, dim=-1)
    first, second = qk_TKHD.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    rotated = rotated.to(qk_TKHD.dtype)
    stored_T = slots_T >= 0
    keys_KSD[:, slots_T[stored_T]] = rotated[stored_T, :, -1].transpose(0, 1)
    values_KSD[:, slots_T[stored_T]] = v_TKD[stored_T].transpose(0, 1)
    return rotated[:, :, :-1].flatten(1, 2)
