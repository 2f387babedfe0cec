"""Twin of csps_kernels.causal. Suffixes as there."""

import torch
from torch import Tensor


def attention(
    q_NHTD: Tensor, k_NKLD: Tensor, v_NKLD: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """As the kernel's contract says, but o in fp32."""
    group = q_NHTD.shape[1] // k_NKLD.shape[1]
    k_NHLD, v_NHLD = (x.float().repeat_interleave(group, dim=1) for x in (k_NKLD, v_NKLD))
    scores_NHTL = q_NHTD.float() @ k_NHLD.mT / q_NHTD.shape[3] ** 0.5
    if causal:
        later_TL = torch.ones(scores_NHTL.shape[2:], dtype=torch.bool, device=q_NHTD.device).triu(1)
        scores_NHTL = scores_NHTL.masked_fill(later_TL, -torch.inf)
    return scores_NHTL.softmax(3) @ v_NHLD, scores_NHTL.logsumexp(3)
