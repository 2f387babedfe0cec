"""Attention mass of sampled rows, by block, where the keys are: in torch.

A row's mass in block j is sum_{t in j} exp(q.k_t - LSE) with the log-sum-exp over all keys the
row sees, on all ranks. An owner computes the sums relative to its own peak; the ranks exchange
their log-sum-exps; then each owner knows its blocks' true masses and replies with the mean over
the rows that chose, which is G * M times smaller than what it computed.

Rows that choose are summed with a fast exponential (within 3%, and sums of many average it out):
their masses are estimates anyway, and the exponential is a third of the time. Probes are exact.

Suffixes: K KV heads, N tiles, M rows of a tile that choose, E probes, R = M + E, J blocks of this
owner, B tokens, D head dim, X rows of several tiles.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from csps.attention.select import Rows

# Tiles scored at a time: enough rows for the matrix product, scores that stay in cache.
TILES_AT_ONCE = 8
LOWEST = torch.finfo(torch.float32).min

# exp(x) ~ the float whose bits are x * 2^23 / ln 2 + bias: the exponent is right, the mantissa
# linear (Schraudolph, Neural Computation 11, 1999; the constant that minimises the rms error).
BITS_PER_UNIT = 2**23 / math.log(2)
BIAS = 127 * 2**23 - 366_393


@dataclass(frozen=True)
class BlockKeys:
    """Keys of one rank's blocks in one layer, where they lie.

    `flat`: a store's flat pages [P, B, D]; `pages`: flat pages of the blocks of each KV head, in
    order, int64 [K, J], on the same device.
    """

    flat: Tensor
    pages: Tensor

    @cached_property
    def gathered(self) -> Tensor:
        """[K, J, B, D]: a copy in fp32, made once and only if someone wants it."""
        return self.flat[self.pages].float()


@dataclass(frozen=True, slots=True)
class Scores:
    """What rows see of one owner's shard: `mass` [K, N, R, J], `peak`, `lse` [K, N, R], fp32.

    Rows that choose stand before probes. `mass` is relative to exp(peak); where nothing is
    visible it is 0 and `lse` is -inf.
    """

    mass: Tensor
    peak: Tensor
    lse: Tensor

    def masses(self, total_lse_KNR: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
        """See csps.attention.backends.RowScores."""
        weights = torch.exp(self.peak - total_lse_KNR)
        mean_KNJ = torch.einsum(
            "knm,knmj->knj", weights[..., :num_chosen], self.mass[:, :, :num_chosen]
        ).div_(max(num_chosen, 1))
        probes_KNEJ = self.mass[:, :, num_chosen:] * weights[..., num_chosen:, None]
        return mean_KNJ, probes_KNEJ.transpose(2, 3)


def score_rows(
    rows: Rows,
    positions_KNR: Tensor,
    tiles_N: Tensor,
    keys: BlockKeys,
    blocks_J: Tensor,
) -> Scores:
    """See csps.attention.backends.Score."""
    return score(*rows.scaled(), positions_KNR, tiles_N, keys.gathered, blocks_J)


def score(
    chosen_KNMD: Tensor,
    probes_KNED: Tensor,
    positions_KNR: Tensor,
    tiles_N: Tensor,
    keys_KJBD: Tensor,
    blocks_J: Tensor,
) -> Scores:
    """Score rows of tiles against one owner's keys; all fp32, rows scaled by 1 / sqrt(D).

    Keys behind a row's position do not count, so the same call serves a rank's own tiles and
    those of others. tiles and blocks ascend.
    """
    num_kv_heads, num_tiles, num_chosen, _ = chosen_KNMD.shape
    num_rows = num_chosen + probes_KNED.shape[2]
    size = keys_KJBD.shape[2]
    mass = chosen_KNMD.new_zeros(num_kv_heads, num_tiles, num_rows, len(blocks_J))
    peak = chosen_KNMD.new_full((num_kv_heads, num_tiles, num_rows), LOWEST)
    lse = chosen_KNMD.new_full((num_kv_heads, num_tiles, num_rows), -torch.inf)
    # Reused: fresh memory of this size would cost a page fault per thousand scores.
    most = min(TILES_AT_ONCE, num_tiles) * num_rows
    buffer = chosen_KNMD.new_empty(most * len(blocks_J) * size)
    key_positions = blocks_J[:, None] * size + torch.arange(size, device=blocks_J.device)
    tiles_on_host, blocks_on_host = (x.cpu().numpy() for x in (tiles_N, blocks_J))
    chosen_KNMD = chosen_KNMD * BITS_PER_UNIT
    for first in range(0, num_tiles, TILES_AT_ONCE):
        tiles = slice(first, min(first + TILES_AT_ONCE, num_tiles))
        count = tiles.stop - first
        whole = int(np.searchsorted(blocks_on_host, tiles_on_host[tiles][0], side="left"))
        some = int(np.searchsorted(blocks_on_host, tiles_on_host[tiles][-1], side="right"))
        if not some:
            continue
        # Only blocks from the first tile's own on can lie behind a row.
        tail = key_positions[whole:some].flatten()
        for head in range(num_kv_heads):
            kinds = chosen_KNMD[head, tiles], probes_KNED[head, tiles]
            split = count * num_chosen
            scores = buffer[: count * num_rows * some * size].view(count * num_rows, -1)
            rows = torch.cat([rows.flatten(0, 1) for rows in kinds])
            torch.mm(rows, keys_KJBD[head, :some].flatten(0, 1).T, out=scores)
            places = positions_KNR[head, tiles]
            for part, sum_blocks, at in (
                (scores[:split], _fast_sums, slice(0, num_chosen)),
                (scores[split:], _exact_sums, slice(num_chosen, num_rows)),
            ):
                behind = places[:, at].flatten()[:, None] < tail
                part[:, whole * size :].masked_fill_(behind, -torch.inf)
                sums_XJ, peak_X = sum_blocks(part, size)
                mass[head, tiles, at, :some] = sums_XJ.view(count, -1, some)
                peak[head, tiles, at] = peak_X.view(count, -1)
                lse[head, tiles, at] = (peak_X + sums_XJ.sum(1).log()).view(count, -1)
    return Scores(mass, peak, lse)


def _exact_sums(scores_XL: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sums of exp(score - peak) by block, and the peak. Overwrites the scores."""
    peak = scores_XL.amax(1, keepdim=True).clamp_min_(LOWEST)
    return scores_XL.sub_(peak).exp_().unflatten(1, (-1, size)).sum(-1), peak[:, 0]


def _fast_sums(scores_XL: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """As `_exact_sums`, of scores in units of 1 / BITS_PER_UNIT.

    The peak is rounded up to a power of 2: then the exponential's error depends on the score
    alone, and not on which keys share an owner.
    """
    peak = scores_XL.amax(1, keepdim=True).clamp_min_(LOWEST)
    peak = peak.div_(2**23).ceil_().mul_(2**23).clamp_min_(LOWEST)
    bits = scores_XL.sub_(peak - BIAS).clamp_min_(0.0).view(torch.int32)
    bits.copy_(scores_XL)  # in place: each float becomes the integer it holds
    sums = bits.view(torch.float32).unflatten(1, (-1, size)).sum(-1)
    return sums, peak[:, 0] / BITS_PER_UNIT
