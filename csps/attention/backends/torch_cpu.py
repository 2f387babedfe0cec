"""torch's fused CPU attention, which also returns the log-sum-exp.

Suffixes: T rows, L keys, H query heads, K KV heads, D head dim.
"""

import torch
from torch import Tensor

from csps.attention.backends import Kernels
from csps.attention.backends.block_sparse_cpu import BlockSparseCpu
from csps.attention.merge import merge_rows
from csps.attention.messages import HeadMessages
from csps.attention.rotate import rotate_rows
from csps.attention.runs import RowByRow
from csps.attention.score import score_rows
from csps.attention.select import keep_by_mass

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# From this many rows on, converting K and V once is cheaper than in every block of rows.
MIN_UPCAST_ROWS = 64


class TorchCpu:
    """See `Partial`. `upcast`: the CPU has no bf16 arithmetic of its own, so fp32 is faster."""

    def __init__(self, *, upcast: bool) -> None:
        self._upcast = upcast

    def __call__(
        self, q_THD: Tensor, k_LKD: Tensor, v_LKD: Tensor, *, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """(o [T, H, D] in q's dtype, or fp32 where it was upcast, lse [T, H] fp32)."""
        num_rows = q_THD.shape[0]
        if self._upcast and num_rows >= MIN_UPCAST_ROWS:
            q_THD, k_LKD, v_LKD = q_THD.float(), k_LKD.float(), v_LKD.float()
        if num_rows == 1:
            return _one_row(q_THD, k_LKD, v_LKD)
        q_1HTD, k_1KLD, v_1KLD = (x.transpose(0, 1).unsqueeze(0) for x in (q_THD, k_LKD, v_LKD))
        o_1HTD, lse_1HT = _flash(q_1HTD, k_1KLD, v_1KLD, 0.0, causal)
        return o_1HTD[0].transpose(0, 1), lse_1HT[0].transpose(0, 1)


def _one_row(q_1HD: Tensor, k_LKD: Tensor, v_LKD: Tensor) -> tuple[Tensor, Tensor]:
    """The heads of a group become rows, so that K and V are read once per KV head."""
    num_heads, head_dim = q_1HD.shape[1:]
    num_kv_heads = k_LKD.shape[1]
    q_1KGD = q_1HD.reshape(1, num_kv_heads, num_heads // num_kv_heads, head_dim)
    k_1KLD, v_1KLD = (x.transpose(0, 1).unsqueeze(0) for x in (k_LKD, v_LKD))
    o_1KGD, lse_1KG = _flash(q_1KGD, k_1KLD, v_1KLD, 0.0, False)
    return o_1KGD.reshape(1, num_heads, head_dim), lse_1KG.reshape(1, num_heads)


class DiagonalCpu:
    """Causal attention of tiles over their own tokens, all in one call.

    `upcast` as in TorchCpu.
    """

    def __init__(self, *, upcast: bool) -> None:
        self._upcast = upcast

    def __call__(self, q_IGBD: Tensor, k_IBD: Tensor, v_IBD: Tensor) -> tuple[Tensor, Tensor]:
        """(o [I, G, B, D] in q's dtype or fp32, lse [I, G, B] fp32)."""
        if self._upcast:
            q_IGBD, k_IBD, v_IBD = q_IGBD.float(), k_IBD.float(), v_IBD.float()
        if not len(q_IGBD):
            return q_IGBD, q_IGBD.new_empty(q_IGBD.shape[:3], dtype=torch.float32)
        return _flash(q_IGBD, k_IBD.unsqueeze(1), v_IBD.unsqueeze(1), 0.0, True)


def cpu_kernels(*, upcast: bool, num_threads: int) -> Kernels:
    """All of them; `upcast` and `num_threads` as in BlockSparseCpu."""
    partial = TorchCpu(upcast=upcast)
    return Kernels(
        rotate=rotate_rows,
        partial=partial,
        block_sparse=BlockSparseCpu(upcast=upcast, num_threads=num_threads),
        diagonal=DiagonalCpu(upcast=upcast),
        score=score_rows,
        choose=keep_by_mass,
        paged_decode=RowByRow(partial),
        merge=merge_rows,
        messages=HeadMessages,
    )
