"""torch's fused CPU attention, which also returns the log-sum-exp."""

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def partial(
    q_THD: Tensor, k_LHD: Tensor, v_LHD: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """See `Partial`."""
    num_rows, num_heads, head_dim = q_THD.shape
    num_kv_heads = k_LHD.shape[1]
    k = k_LHD.transpose(0, 1).unsqueeze(0)
    v = v_LHD.transpose(0, 1).unsqueeze(0)
    if causal or num_rows > 1:
        o, lse = _flash(q_THD.transpose(0, 1).unsqueeze(0), k, v, 0.0, causal)
        return o[0].transpose(0, 1), lse[0].transpose(0, 1)
    # One row: the heads of a group become rows, so K and V are read once per KV head.
    q = q_THD.reshape(1, num_kv_heads, num_heads // num_kv_heads, head_dim)
    o, lse = _flash(q, k, v, 0.0, False)
    return o.reshape(1, num_heads, head_dim), lse.reshape(1, num_heads)
