"""Exact merge of attention over disjoint sets of keys.

With partial outputs o_i and log-sum-exps L_i: L = logsumexp(L_i), o = sum exp(L_i - L) o_i
(Flash-Decoding; FlashInfer, arXiv 2501.01005, section 2.2). Natural logarithm throughout.
Suffixes: T rows, H query heads, D head dim.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from csps.attention.backends import MergeRows
from csps.parallel.upload import upload


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


def pack(o_THD: Tensor, lse_TH: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows of (o, lse) as one uint8 message [T, H * (D * e + 4)] (`out`); one message, not two."""
    o_bytes = o_THD.flatten(1).contiguous().view(torch.uint8)
    lse_bytes = lse_TH.float().contiguous().view(torch.uint8)
    return torch.cat((o_bytes, lse_bytes), dim=1, out=out)


def packed_row_bytes(num_heads: int, head_dim: int, element_bytes: int) -> int:
    """Bytes of one row of `pack`: q-sized output plus 4 bytes per head."""
    return num_heads * (head_dim * element_bytes + 4)


def unpack(
    message: Tensor, num_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Inverse of `pack`: (o [T, H, D] of `dtype`, lse [T, H] fp32), views of the message.

    What is written to them is packed. There must be a head.
    """
    split = num_heads * head_dim * dtype.itemsize
    o_THD = message[:, :split].view(dtype).unflatten(1, (num_heads, head_dim))
    return o_THD, message[:, split:].view(torch.float32)


def merge_rows(
    rows_by_source: Sequence[np.ndarray], num_rows: int, device: torch.device
) -> MergeRows:
    """`Merge`, one source after the other."""
    sources = upload(rows_by_source, device)
    sizes = [len(rows) for rows in sources]

    def merge(
        message_MB: Tensor, out_THD: Tensor, own: tuple[Tensor, Tensor] | None = None
    ) -> None:
        shape = (num_rows, *out_THD.shape[1:])
        if own is None:
            acc_THD = torch.zeros(shape, dtype=torch.float32, device=device)
            lse_TH = acc_THD.new_full(shape[:2], -torch.inf)
        else:
            acc_THD, lse_TH = own
        for rows, part_NB in zip(sources, message_MB.split(sizes), strict=True):
            o_NHD, part_NH = unpack(part_NB, shape[1], shape[2], out_THD.dtype)
            merged_NHD, merged_NH = acc_THD[rows], lse_TH[rows]
            merge_into(merged_NHD, merged_NH, o_NHD, part_NH)
            acc_THD[rows], lse_TH[rows] = merged_NHD, merged_NH
        out_THD.copy_(acc_THD)

    return merge
