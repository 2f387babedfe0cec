"""What csps_kernels.score computes, through the matrix of all rows by all keys."""

import math

import torch
from torch import Tensor


def score_blocks(
    rows_KNRD: Tensor,
    scale_KNR: Tensor,
    positions_KNR: Tensor,
    tiles_N: Tensor,
    k_PBD: Tensor,
    pages_KJ: Tensor,
    blocks_J: Tensor,
) -> tuple[Tensor, Tensor]:
    """See csps_kernels.score.score_blocks; pairs that it does not write are -inf."""
    page_size = k_PBD.shape[1]
    keys_KJBD = k_PBD[pages_KJ].float()
    scores_KNRJB = torch.einsum("knrd,kjbd->knrjb", rows_KNRD.float(), keys_KJBD)
    scores_KNRJB *= scale_KNR[..., None, None]
    offsets_B = torch.arange(page_size, device=k_PBD.device)
    key_positions_JB = blocks_J[:, None] * page_size + offsets_B
    hidden_KNRJB = key_positions_JB > positions_KNR[..., None, None]
    hidden_KNRJB |= (blocks_J > tiles_N[:, None])[:, None, :, None]
    scores_KNRJB.masked_fill_(hidden_KNRJB, -torch.inf)
    block_lse_KNRJ = scores_KNRJB.logsumexp(-1)
    block_lse_KJX = block_lse_KNRJ.flatten(1, 2).transpose(1, 2) * math.log2(math.e)
    return block_lse_KJX, block_lse_KNRJ.logsumexp(-1)


def block_masses(
    block_lse_KJX: Tensor, total_lse_KNR: Tensor, seen_N: Tensor, num_chosen: int
) -> tuple[Tensor, Tensor]:
    """See csps_kernels.score.block_masses."""
    blocks_J = torch.arange(block_lse_KJX.shape[1], device=seen_N.device)
    natural_KXJ = block_lse_KJX.transpose(1, 2) * math.log(2.0)
    natural_KNRJ = natural_KXJ.unflatten(1, total_lse_KNR.shape[1:])
    total_KNR = total_lse_KNR.masked_fill(total_lse_KNR == -torch.inf, 0.0)
    mass_KNRJ = (natural_KNRJ - total_KNR.unsqueeze(-1)).exp()
    mass_KNRJ = mass_KNRJ.where((blocks_J < seen_N[:, None])[:, None], 0.0)
    mean_KNJ = mass_KNRJ[:, :, :num_chosen].sum(2) / max(num_chosen, 1)
    return mean_KNJ, mass_KNRJ[:, :, num_chosen:].transpose(2, 3)
