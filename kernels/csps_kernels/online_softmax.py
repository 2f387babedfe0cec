"""The online softmax that the attention kernels share.

Milakov and Gimelshein, arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691. Exponents are base 2
inside, as the hardware's; the log-sum-exp that leaves is natural. Products of fp32 are tf32x3:
nearly as exact as fp32's own, and on tensor cores. Suffixes: M rows, N keys of a block, D head
dim.
"""

import math

import triton
import triton.language as tl

LN2 = tl.constexpr(math.log(2.0))


def base_2_scale(head_dim: int) -> float:
    """What scores q k are multiplied with, for exponents base 2: log2(e) / sqrt(D)."""
    return math.log2(math.e) / math.sqrt(head_dim)


@triton.jit
def add_block(scores_MN, v_ND, acc_MD, max_M, sum_M, scale):
    """Take a block of keys into (acc, max, sum); scores are q k, -inf where a key is unseen.

    Every row has seen a key after its first block.
    """
    new_max_M = tl.maximum(max_M, tl.max(scores_MN, 1) * scale)
    weights_MN = tl.exp2(scores_MN * scale - new_max_M[:, None])
    rescale_M = tl.exp2(max_M - new_max_M)
    sum_M = sum_M * rescale_M + tl.sum(weights_MN, 1)
    acc_MD = acc_MD * rescale_M[:, None]
    acc_MD = tl.dot(weights_MN.to(v_ND.dtype), v_ND, acc_MD, input_precision="tf32x3")
    return acc_MD, new_max_M, sum_M


@triton.jit
def finish(acc_MD, max_M, sum_M):
    """(o, natural-log lse); a row that saw no key has o = 0 and lse = -inf."""
    sum_M = tl.where(sum_M == 0.0, 1.0, sum_M)
    return acc_MD / sum_M[:, None], (max_M + tl.log2(sum_M)) * LN2
