"""Which KV blocks a query tile keeps: sampled rows, and the smallest set that reaches gamma.

m real query rows of every query head stand for a tile. They travel as int8 to the owners of
the KV (csps.attention.score says what comes back): the mean of their exact block masses
estimates the tile's. Rows are spaced evenly and staggered over the heads of a group, so that
m * G different positions are seen. *Probes* are rows that took no part in the choice: one
decides whether it is good enough, another says how good it is (csps.attention.recall).

Nothing here depends on which rank holds what, so neither does the choice.

Suffixes: N tiles, B tokens of a tile, K KV heads, G query heads per KV head, M rows that choose,
E probes, D head dim, J blocks of the sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csps.attention.int8 import dequantize, quantize
from csps.parallel.upload import upload

NUM_PROBES = 2  # per tile and KV head
WINDOW_BLOCKS = 1  # kept right behind the diagonal, whatever they hold
# A mass in fp16, and the share of a tile's mass that may be lost, are whole numbers of 1 / these.
MASS_UNITS, LOST_UNITS = 2**24, 2**30


@dataclass(frozen=True, slots=True)
class Rows:
    """Sampled rows of some tiles as they travel; their positions all ranks can derive.

    `chosen` [K, N, M, D] int8 with `scale` [K, N, M] fp16; `probes` [K, N, E, D] exact.
    """

    chosen: Tensor
    scale: Tensor
    probes: Tensor

    def scaled(self) -> tuple[Tensor, Tensor]:
        """Rows that choose and probes, times 1 / sqrt(D), fp32."""
        softmax_scale = self.chosen.shape[-1] ** -0.5
        chosen = dequantize(self.chosen, self.scale).mul_(softmax_scale)
        return chosen, self.probes.float() * softmax_scale


class Probes(NamedTuple):
    """One layer's probes of all tiles: query head of the group, offset; int64 [N, K, E] each."""

    heads: Tensor
    offsets: Tensor


class RowSampler:
    """Where the rows of a tile lie; the same for every layer but for the probes."""

    def __init__(
        self,
        *,
        block_size: int,
        num_kv_heads: int,
        group_size: int,
        rows_per_tile: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._num_kv_heads, self._group_size = num_kv_heads, group_size
        self._block_size, self._seed, self._device = block_size, seed, device
        # At most half the tile chooses: someone must be left to probe.
        per_head = min(rows_per_tile, max(block_size // 2, 1)) if rows_per_tile else 0
        order = np.arange(per_head)[None] * group_size + np.arange(group_size)[:, None]
        spaced = (order + 0.5) * block_size / max(per_head * group_size, 1)
        self._offsets_GM = spaced.astype(np.int64)
        self._chosen_GM = torch.from_numpy(self._offsets_GM).to(device)
        self._spare_GS = np.stack(
            [np.setdiff1d(np.arange(block_size), offsets) for offsets in self._offsets_GM]
        ) if per_head else np.tile(np.arange(block_size), (group_size, 1))  # fmt: skip

    @property
    def num_chosen(self) -> int:
        """M: rows that choose, of all query heads of a KV head."""
        return int(self._offsets_GM.size)

    @property
    def num_probes(self) -> int:
        """E: fewer where the tile has no rows to spare."""
        return min(NUM_PROBES, self._spare_GS.shape[1])

    @property
    def may_probe(self) -> np.ndarray:
        """Rows of a tile that take no part in the choice: bool [G, B]."""
        rows = np.ones((self._group_size, self._block_size), dtype=bool)
        np.put_along_axis(rows, self._offsets_GM, False, axis=1)
        return rows

    def draw(self, layer: int, num_tiles: int) -> Probes:
        """Of the sequence's first tiles."""
        # A tile's draw depends on seed, layer and tile alone: rows of random numbers by tile.
        shape = (num_tiles, self._num_kv_heads, self.num_probes)
        draws = np.random.default_rng((self._seed, layer)).random((*shape, 2))
        heads = (draws[..., 0] * self._group_size).astype(np.int64)
        spare = (draws[..., 1] * self._spare_GS.shape[1]).astype(np.int64)
        offsets = self._spare_GS[heads, spare]
        drawn = upload([heads.ravel(), offsets.ravel()], self._device)
        return Probes(*(part.view(shape) for part in drawn))

    def offsets(self, probes: Probes, tiles_N: Tensor) -> Tensor:
        """Offset in the tile of every row, those that choose first: int64 [K, N, M + E]."""
        shape = (self._num_kv_heads, len(tiles_N), self.num_chosen)
        chosen_KNM = self._chosen_GM.reshape(1, 1, -1).expand(shape)
        return torch.cat((chosen_KNM, probes.offsets[tiles_N].transpose(0, 1)), dim=2)

    def take(self, probes: Probes, tiles_N: Tensor, q_NBKGD: Tensor) -> Rows:
        """Sample the tiles' queries."""
        num_tiles, _, num_kv_heads, group_size, dim = q_NBKGD.shape
        groups = torch.arange(group_size, device=self._device)[:, None]
        rows = q_NBKGD[:, self._chosen_GM, :, groups]  # [G, M / G, N, K, D]
        rows = rows.permute(3, 2, 0, 1, 4).reshape(num_kv_heads, num_tiles, self.num_chosen, dim)
        tile = torch.arange(num_tiles, device=self._device)[:, None, None]
        kv_head = torch.arange(num_kv_heads, device=self._device)[None, :, None]
        places, heads = probes.offsets[tiles_N], probes.heads[tiles_N]
        probes_KNED = q_NBKGD[tile, places, kv_head, heads].transpose(0, 1)
        return Rows(*quantize(rows), probes_KNED.contiguous())


def forced_blocks(tiles_N: Tensor, num_blocks: int) -> Tensor:
    """Sink, diagonal and local window: bool [N, J]."""
    blocks_J = torch.arange(num_blocks, device=tiles_N.device)
    behind_NJ = tiles_N[:, None] - blocks_J
    near = (behind_NJ >= 0) & (behind_NJ <= WINDOW_BLOCKS)
    return near | ((blocks_J == 0) & (tiles_N[:, None] >= 0))


def visible_blocks(tiles_N: Tensor, num_blocks: int) -> Tensor:
    """What causality lets the tiles see, the diagonal included: bool [N, J]."""
    return torch.arange(num_blocks, device=tiles_N.device) <= tiles_N[:, None]


def keep_by_mass(mass_KNJ: Tensor, tiles_N: Tensor, gammas: Sequence[float]) -> list[Tensor]:
    """For each gamma the fewest blocks whose estimated mass reaches it: bool [K, N, J].

    The forced blocks come first; of blocks of equal mass those at the front. gamma 1 keeps
    everything visible. Masses count as what they are in fp16, below 2: whole numbers of 2**-24,
    whose sums up to 1 are exact in fp32. So neither order nor device changes the choice.
    """
    num_blocks = mass_KNJ.shape[2]
    visible = visible_blocks(tiles_N, num_blocks)
    forced = forced_blocks(tiles_N, num_blocks) & visible
    mass_KNJ = mass_KNJ.half().float()
    optional = mass_KNJ * (visible & ~forced)
    ascending = _sort(optional)
    sums = ascending.cumsum(2)
    total_KN1 = (mass_KNJ * visible).sum(2, keepdim=True, dtype=torch.float64)
    kept = []
    for gamma in gammas:
        if gamma >= 1.0:
            kept.append(visible.expand_as(optional))
            continue
        share = round((1.0 - gamma) * LOST_UNITS)
        lost_KN1 = (total_KN1 * MASS_UNITS).long() * share // LOST_UNITS
        # The smallest go, as long as they add up to no more than may be lost.
        first_kept_KN1 = torch.searchsorted(sums, lost_KN1.float() / MASS_UNITS, right=True)
        kept.append(_from(first_kept_KN1, ascending, optional, scratch=mass_KNJ) | forced)
    return kept


def _sort(mass_KNJ: Tensor) -> Tensor:
    """Each row's masses, ascending."""
    if mass_KNJ.device.type == "cpu":
        # numpy's sort is vectorised: ten times faster than torch's, which also sorts indices.
        return torch.from_numpy(np.sort(mass_KNJ.numpy(), axis=2))
    return mass_KNJ.sort(dim=2).values


def _from(first_KN1: Tensor, ascending_KNJ: Tensor, mass_KNJ: Tensor, scratch: Tensor) -> Tensor:
    """Which masses stand at `first` or behind it in their row's order: bool [K, N, J].

    `scratch`: as many fp32, overwritten.
    """
    num_blocks = mass_KNJ.shape[2]
    limit_KN1 = ascending_KNJ.gather(2, first_KN1.clamp_max(num_blocks - 1))
    limit_KN1.masked_fill_(first_KN1 == num_blocks, torch.inf)
    above_KN1 = torch.searchsorted(ascending_KNJ, limit_KN1, right=True)
    # Of those that equal the limit the first ones.
    equal_KNJ = mass_KNJ == limit_KN1
    torch.cumsum(scratch.copy_(equal_KNJ), 2, out=scratch)
    first_ones_KNJ = scratch <= above_KN1 - first_KN1
    return (mass_KNJ > limit_KN1) | equal_KNJ.logical_and_(first_ones_KNJ)


def keep_by_distance(tiles_N: Tensor, num_blocks: int, window: int) -> Tensor:
    """Sink, the nearest `window` blocks, then every 2nd, 4th, 8th ...: bool [N, J].

    Each time the distance doubles, half as many blocks stay: importance by distance alone,
    as in the CSPS paper (arXiv 2409.15104v1). Positions are absolute, so tiles share blocks.
    """
    behind_D = np.arange(num_blocks)
    doublings_D = np.floor(np.log2(np.maximum(behind_D, 1) / window)).astype(np.int64)
    # Strides are powers of 2: a block that one divides has none of the lower bits.
    (low_bits_D,) = upload([(1 << np.maximum(doublings_D + 1, 0)) - 1], tiles_N.device)
    blocks_J = torch.arange(num_blocks, device=tiles_N.device)
    behind_NJ = (tiles_N[:, None] - blocks_J).clamp_min_(0)
    keep = (blocks_J & low_bits_D[behind_NJ]) == 0
    return (keep | forced_blocks(tiles_N, num_blocks)) & visible_blocks(tiles_N, num_blocks)
