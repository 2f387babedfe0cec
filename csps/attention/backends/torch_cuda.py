"""torch's fused CUDA attention (FlashAttention-2), which also returns the log-sum-exp.

Suffixes: T rows, L keys, H query heads, I items, R rows of an item, G query heads per KV head, B
tokens of a tile or page, P pages, D head dim.
"""

import itertools

import torch
from torch import Tensor

from csps.attention.backends import Kernels, PageLists
from csps.attention.merge import merge_rows
from csps.attention.messages import HeadMessages
from csps.attention.rotate import rotate_rows
from csps.attention.runs import RowByRow
from csps.attention.score import score_rows
from csps.attention.select import keep_by_mass

_flash = torch.ops.aten._scaled_dot_product_flash_attention


def partial(q_THD: Tensor, k_LHD: Tensor, v_LHD: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """See `Partial`."""
    group = q_THD.shape[1] // k_LHD.shape[1]
    q = q_THD.transpose(0, 1).unsqueeze(0)
    k = k_LHD.transpose(0, 1).repeat_interleave(group, dim=0).unsqueeze(0)
    v = v_LHD.transpose(0, 1).repeat_interleave(group, dim=0).unsqueeze(0)
    o, lse = _flash(q, k, v, 0.0, causal, False)[:2]
    return o[0].transpose(0, 1), lse[0].transpose(0, 1)


def block_sparse(
    q_IRD: Tensor, k_PBD: Tensor, v_PBD: Tensor, lists: PageLists
) -> tuple[Tensor, Tensor]:
    """See `BlockSparse`: one call per item on gathered pages."""
    o_IRD = torch.zeros_like(q_IRD)
    lse_IR = torch.full(q_IRD.shape[:2], -torch.inf, device=q_IRD.device)
    starts = lists.starts.tolist()
    for item, (start, stop) in enumerate(itertools.pairwise(starts)):
        pages = lists.pages[start:stop]
        if len(pages):
            k, v = (x[pages].flatten(0, 1)[None, None] for x in (k_PBD, v_PBD))
            o, lse = _flash(q_IRD[item][None, None], k, v, 0.0, False, False)[:2]
            o_IRD[item], lse_IR[item] = o[0, 0], lse[0, 0]
    return o_IRD, lse_IR


def diagonal(q_IGBD: Tensor, k_IBD: Tensor, v_IBD: Tensor) -> tuple[Tensor, Tensor]:
    """See `Diagonal`."""
    if not len(q_IGBD):
        return q_IGBD, q_IGBD.new_empty(q_IGBD.shape[:3], dtype=torch.float32)
    k, v = (x.unsqueeze(1).expand(q_IGBD.shape) for x in (k_IBD, v_IBD))
    return _flash(q_IGBD, k, v, 0.0, True, False)[:2]


KERNELS = Kernels(
    rotate=rotate_rows,
    partial=partial,
    block_sparse=block_sparse,
    diagonal=diagonal,
    score=score_rows,
    choose=keep_by_mass,
    paged_decode=RowByRow(partial),
    merge=merge_rows,
    messages=HeadMessages,
)
