"""Exact merge of attention over disjoint sets of keys.

With partial outputs o_i and log-sum-exps L_i: L = logsumexp(L_i), o = sum exp(L_i - L) o_i
(Flash-Decoding; FlashInfer, arXiv 2501.01005, section 2.2). Natural logarithm throughout.
Suffixes: T rows, H query heads, D head dim.
"""

import torch
from torch import Tensor


def merge_into(acc_THD: Tensor, acc_lse_TH: Tensor, o_THD: Tensor, lse_TH: Tensor) -> None:
    """Merge (o, lse) into the fp32 accumulators, in place.

    A side that saw no key has lse = -inf and any finite o; both sides may be empty.
    """
    merged_TH = torch.logaddexp(acc_lse_TH, lse_TH)
    # Both empty: -inf - -inf is NaN; a finite stand-in makes both weights exp(-inf) = 0.
    stable_TH = merged_TH.clamp_min(torch.finfo(torch.float32).min)
    acc_THD.mul_(torch.exp(acc_lse_TH - stable_TH).unsqueeze(-1))
    acc_THD.addcmul_(o_THD.float(), torch.exp(lse_TH - stable_TH).unsqueeze(-1))
    acc_lse_TH.copy_(merged_TH)


def pack(o_THD: Tensor, lse_TH: Tensor) -> Tensor:
    """Rows of (o, lse) as one uint8 message [T, H * (D * e + 4)]; one message, not two."""
    o_bytes = o_THD.flatten(1).contiguous().view(torch.uint8)
    lse_bytes = lse_TH.float().contiguous().view(torch.uint8)
    return torch.cat((o_bytes, lse_bytes), dim=1)


def packed_row_bytes(num_heads: int, head_dim: int, element_bytes: int) -> int:
    """Bytes of one row of `pack`: q-sized output plus 4 bytes per head."""
    return num_heads * (head_dim * element_bytes + 4)


def unpack(
    message: Tensor, num_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Inverse of `pack`: (o [T, H, D] of `dtype`, lse [T, H] fp32)."""
    split = num_heads * head_dim * dtype.itemsize
    o_THD = message[:, :split].contiguous().view(dtype).unflatten(1, (num_heads, head_dim))
    lse_TH = message[:, split:].contiguous().view(torch.float32)
    return o_THD, lse_TH
