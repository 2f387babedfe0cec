"""torch's fused CUDA attention (FlashAttention-2), which also returns the log-sum-exp."""

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention


def partial(q_THD: Tensor, k_LHD: Tensor, v_LHD: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """See `Partial`."""
    group = q_THD.shape[1] // k_LHD.shape[1]
    q = q_THD.transpose(0, 1).unsqueeze(0)
    k = k_LHD.transpose(0, 1).repeat_interleave(group, dim=0).unsqueeze(0)
    v = v_LHD.transpose(0, 1).repeat_interleave(group, dim=0).unsqueeze(0)
    o, lse = _flash(q, k, v, 0.0, causal, False)[:2]
    return o[0].transpose(0, 1), lse[0].transpose(0, 1)
