"""Twin of csps_kernels.paged_decode. Suffixes as there; L keys of a row."""

import numpy as np
import torch
from torch import Tensor


def paged_decode(
    q_NHD: Tensor,
    k_KPBD: Tensor,
    v_KPBD: Tensor,
    starts: np.ndarray,
    pages: np.ndarray,
    lengths: np.ndarray,
) -> tuple[Tensor, Tensor]:
    """As the kernel's contract says: (o [N, H, D] fp32, lse [N, H])."""
    num_rows, num_heads, dim = q_NHD.shape
    group = num_heads // len(k_KPBD)
    o_NHD = torch.zeros(q_NHD.shape, device=q_NHD.device)
    lse_NH = o_NHD.new_full(o_NHD.shape[:2], -torch.inf)
    for row in range(num_rows):
        index = torch.from_numpy(pages[starts[row] : starts[row + 1]]).to(q_NHD.device)
        if len(index):
            k_HLD, v_HLD = (
                x[:, index].flatten(1, 2)[:, : lengths[row]].float().repeat_interleave(group, 0)
                for x in (k_KPBD, v_KPBD)
            )
            scores_HL = (k_HLD @ q_NHD[row].float()[:, :, None])[:, :, 0] / dim**0.5
            o_NHD[row] = (scores_HL.softmax(1)[:, None] @ v_HLD)[:, 0]
            lse_NH[row] = scores_HL.logsumexp(1)
    return o_NHD, lse_NH
