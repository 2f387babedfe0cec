"""What csps_kernels.rope_store computes, an operation at a time."""

import torch
from torch import Tensor

from csps_kernels.rope_store import Places


def rope_store(
    qk_TKHD: Tensor,
    v_TKD: Tensor,
    table_PD: Tensor,
    positions_T: Tensor,
    places: Places | None,
) -> tuple[Tensor, Tensor]:
    """See csps_kernels.rope_store.rope_store."""
    cos, sin = table_PD[positions_T][:, None, None].chunk(2, dim=-1)
    first, second = qk_TKHD.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    rotated = rotated.to(qk_TKHD.dtype)
    if places is not None:
        stored_T = places.slots_T >= 0
        slots = places.slots_T[stored_T]
        places.keys_KSD[:, slots] = rotated[stored_T, :, -1].transpose(0, 1)
        places.values_KSD[:, slots] = v_TKD[stored_T].transpose(0, 1)
    return rotated[:, :, :-1].flatten(1, 2), rotated[:, :, -1]
