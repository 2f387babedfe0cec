"""Triton kernels (csps_kernels); only imported where triton is installed and chosen.

Suffixes: T rows, L keys, H query heads, I items, R rows of an item, G query heads per KV head, B
tokens of a tile or page, P pages, D head dim, K KV heads, N tiles, J blocks.
"""

from collections.abc import Sequence

from torch import Tensor

from csps.attention.backends import Kernels, PageLists
from csps.attention.backends.triton_decode import PagedDecode, merge
from csps.attention.backends.triton_messages import HeadMessages
from csps.attention.backends.triton_rotate import rotate
from csps.attention.backends.triton_score import score
from csps.attention.select import WINDOW_BLOCKS
from csps_kernels.block_sparse import block_sparse as attend_pages
from csps_kernels.causal import attention
from csps_kernels.choose import choose as choose_blocks


def partial(q_THD: Tensor, k_LHD: Tensor, v_LHD: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """See `Partial`."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THD, k_LHD, v_LHD))
    o, lse = attention(q, k, v, causal=causal)
    return o[0].transpose(0, 1), lse[0].transpose(0, 1)


def block_sparse(
    q_IRD: Tensor, k_PBD: Tensor, v_PBD: Tensor, lists: PageLists
) -> tuple[Tensor, Tensor]:
    """See `BlockSparse`."""
    return attend_pages(q_IRD, k_PBD, v_PBD, *lists)


def diagonal(q_IGBD: Tensor, k_IBD: Tensor, v_IBD: Tensor) -> tuple[Tensor, Tensor]:
    """See `Diagonal`."""
    return attention(q_IGBD, k_IBD.unsqueeze(1), v_IBD.unsqueeze(1), causal=True)


def choose(mass_KNJ: Tensor, tiles_N: Tensor, gammas: Sequence[float]) -> list[Tensor]:
    """See `Choose`."""
    mass_KNJ = mass_KNJ.half().contiguous()
    return [choose_blocks(mass_KNJ, tiles_N, gamma, WINDOW_BLOCKS) for gamma in gammas]


KERNELS = Kernels(
    rotate=rotate,
    partial=partial,
    block_sparse=block_sparse,
    diagonal=diagonal,
    score=score,
    choose=choose,
    paged_decode=PagedDecode(),
    merge=merge,
    messages=HeadMessages,
)
