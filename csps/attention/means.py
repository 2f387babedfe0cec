"""Block masses from mean keys: the estimate that moves little and knows little.

An owner sends the mean of every 16 keys; a requester scores all its queries against them. By
Jensen's inequality log sum_t exp(q.k_t) >= q.mean(k) + log 16: the estimate is a lower bound,
and a sharp match disappears in its mean. Kept as a baseline of sampled rows.

Suffixes: K KV heads, N tiles, R rows of a tile, J blocks, C means of a block, B tokens, D head
dim.
"""

import math

import numpy as np
import torch
from torch import Tensor

KEYS_PER_MEAN = 16


def keys_per_mean(block_size: int) -> int:
    """16, or what divides the block."""
    return math.gcd(block_size, KEYS_PER_MEAN)


def mean_keys(keys_KJBD: Tensor) -> Tensor:
    """[K, J, C, D]."""
    return keys_KJBD.unflatten(2, (-1, keys_per_mean(keys_KJBD.shape[2]))).mean(3)


def mass_by_means(
    q_KNRD: Tensor,
    diagonal_lse_KNR: Tensor,
    means_KJCD: Tensor,
    num_keys: int,
    tiles_N: np.ndarray,
) -> Tensor:
    """Mean mass over the rows of each tile: fp32 [K, N, J]; the diagonal is exact.

    q is scaled by 1 / sqrt(D) and fp32, as the means are, of `num_keys` keys each.
    """
    num_kv_heads, num_blocks, num_means, _ = means_KJCD.shape
    weight = math.log(num_keys)
    mass = q_KNRD.new_zeros(num_kv_heads, len(tiles_N), num_blocks)
    for index, tile in enumerate(tiles_N.tolist()):
        mass[:, index, tile] = 1.0
        if not tile:
            continue
        means = means_KJCD[:, :tile].flatten(1, 2)
        scores = q_KNRD[:, index] @ means.transpose(1, 2) + weight  # [K, R, tile * C]
        lse = torch.logaddexp(scores.logsumexp(2), diagonal_lse_KNR[:, index])
        by_block = (scores - lse.unsqueeze(2)).exp_().unflatten(2, (tile, num_means)).sum(3)
        mass[:, index, :tile] = by_block.mean(1)
        mass[:, index, tile] = 1.0 - mass[:, index, :tile].sum(1)
    return mass
