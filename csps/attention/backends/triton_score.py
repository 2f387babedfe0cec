"""Scores of sampled rows by csps_kernels.score, for the triton backend.

Suffixes: K KV heads, N tiles, R rows of a tile, X = N * R rows, J blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from csps.attention.score import BlockKeys
from csps.attention.select import Rows
from csps_kernels.score import block_masses, score_blocks, seen_blocks


@dataclass(frozen=True, slots=True)
class BlockScores:
    """See `RowScores`. `block_lse` [K, J, X]: base 2, of the blocks that `seen` [N] counts."""

    lse: Tensor
    block_lse: Tensor
    seen: Tensor

    def masses(self, total_lse_KNR: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
        """See `RowScores`."""
        return block_masses(self.block_lse, total_lse_KNR, self.seen, num_chosen)


def score(
    rows: Rows,
    positions_KNR: Tensor,
    tiles_N: Tensor,
    keys: BlockKeys,
    blocks_J: Tensor,
) -> BlockScores:
    """See `Score`."""
    device, dtype = keys.flat.device, keys.flat.dtype
    # int8 is exact in any of the dtypes: the rows' scales meet their scores, in fp32.
    rows_KNRD = torch.cat((rows.chosen.to(dtype), rows.probes.to(dtype)), dim=2)
    unscaled = torch.ones(rows.probes.shape[:3], device=device)
    scale_KNR = torch.cat((rows.scale.float(), unscaled), dim=2) * rows_KNRD.shape[-1] ** -0.5
    block_lse_KJX, lse_KNR = score_blocks(
        rows_KNRD, scale_KNR, positions_KNR, tiles_N, keys.flat, keys.pages, blocks_J
    )
    return BlockScores(lse_KNR, block_lse_KJX, seen_blocks(tiles_N, blocks_J))
