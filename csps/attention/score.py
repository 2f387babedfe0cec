"""Exact attention mass of sampled rows, by block, where the keys are.

A row's mass in block j is sum_{t in j} exp(q.k_t - LSE) with the log-sum-exp over all keys the
row sees, on all ranks. An owner computes the sums relative to its own peak; the ranks exchange
their log-sum-exps; then each owner knows its blocks' true masses and replies with the mean over
the rows that chose, which is G * M times smaller than what it computed.

Suffixes: K KV heads, N tiles, R rows of a tile, J blocks of this owner, B tokens, D head dim.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Tiles scored at a time: enough rows for the matrix product, scores that stay in cache.
TILES_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Scores:
    """What rows see of one owner's shard: `mass` [K, N, R, J], `peak`, `lse` [K, N, R], fp32.

    `mass` is relative to exp(peak); where nothing is visible it is 0 and `lse` is -inf.
    """

    mass: Tensor
    peak: Tensor
    lse: Tensor

    def true_mass(self, total_lse_KNR: Tensor) -> Tensor:
        """[K, N, R, J] given the rows' log-sum-exp over all owners."""
        # Every row sees at least itself, so the total is finite.
        return self.mass * torch.exp(self.peak - total_lse_KNR).unsqueeze(-1)


def score(
    rows_KNRD: Tensor,
    positions_KNR: np.ndarray,
    tiles_N: np.ndarray,
    keys_KJBD: Tensor,
    blocks_J: np.ndarray,
) -> Scores:
    """Score rows (fp32, scaled) of tiles against one owner's keys (fp32).

    Keys behind a row's position do not count, so the same call serves a rank's own tiles and
    those of others. tiles and blocks ascend.
    """
    num_kv_heads, num_tiles, num_rows, _ = rows_KNRD.shape
    size = keys_KJBD.shape[2]
    mass = rows_KNRD.new_zeros(num_kv_heads, num_tiles, num_rows, len(blocks_J))
    peak = rows_KNRD.new_full((num_kv_heads, num_tiles, num_rows), torch.finfo(torch.float32).min)
    lse = rows_KNRD.new_full((num_kv_heads, num_tiles, num_rows), -torch.inf)
    key_positions = torch.from_numpy(blocks_J[:, None] * size + np.arange(size))
    positions = torch.from_numpy(positions_KNR)
    for first in range(0, num_tiles, TILES_AT_ONCE):
        tiles = slice(first, min(first + TILES_AT_ONCE, num_tiles))
        whole = int(np.searchsorted(blocks_J, tiles_N[tiles][0], side="left"))
        some = int(np.searchsorted(blocks_J, tiles_N[tiles][-1], side="right"))
        if not some:
            continue
        for head in range(num_kv_heads):
            rows = rows_KNRD[head, tiles].flatten(0, 1)
            scores = rows @ keys_KJBD[head, :some].flatten(0, 1).T
            # Only blocks from the first tile's own on can lie behind a row.
            behind = positions[head, tiles].flatten()[:, None] < key_positions[whole:some].flatten()
            scores[:, whole * size :].masked_fill_(behind, -torch.inf)
            top = scores.amax(1, keepdim=True).clamp_min_(torch.finfo(torch.float32).min)
            sums = scores.sub_(top).exp_().view(len(rows), some, size).sum(-1)
            shape = (tiles.stop - tiles.start, num_rows)
            mass[head, tiles, :, :some] = sums.view(*shape, some)
            peak[head, tiles] = top.view(shape)
            lse[head, tiles] = (top[:, 0] + sums.sum(1).log()).view(shape)
    return Scores(mass, peak, lse)
