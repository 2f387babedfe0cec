"""Which tiles of one sequence see which blocks: what every message's size and order follow from.

Suffixes: N tiles of one rank, J blocks, V visible (tile, block) pairs.
"""

import numpy as np
import torch
from torch import Tensor

from csps.attention.shards import SparseSequence


class Sight:
    """One sequence as rank `me` sees it. What all layers need lies on the device, made once.

    `tiles[r]`, `blocks[r]`: rank r's, without the prompt's last tile; ascending.
    """

    def __init__(self, seq: SparseSequence, me: int, device: torch.device) -> None:
        self.blocks = seq.blocks
        self.tiles = tuple(tiles[tiles != seq.last_tile] for tiles in seq.tiles)
        self.ranks = tuple(rank for rank, blocks in enumerate(seq.blocks) if len(blocks))
        self.causal_pairs = sum(int((tiles + 1).sum()) for tiles in self.tiles)
        self._me, self._num_blocks = me, seq.num_blocks
        self.tiles_on_device, self.blocks_on_device = (
            tuple(torch.from_numpy(x).to(device) for x in arrays)
            for arrays in (self.tiles, self.blocks)
        )
        self._wanted: dict[int, Tensor] = {}
        self._asked: dict[int, Tensor] = {}

    def first(self, requester: int, owner: int) -> int:
        """Index of the requester's first tile that sees a block of the owner; all later do."""
        if requester == owner:
            return 0
        return int(np.searchsorted(self.tiles[requester], self.blocks[owner][0], side="right"))

    def seen(self, requester: int, owner: int) -> np.ndarray:
        """The requester's tiles that see the owner."""
        return self.tiles[requester][self.first(requester, owner) :]

    def num_pairs(self, requester: int, owner: int) -> int:
        """V of a requester's tiles and an owner's blocks, diagonal included."""
        return int(np.searchsorted(self.blocks[owner], self.tiles[requester], side="right").sum())

    def wanted(self, owner: int) -> Tensor:
        """Pairs of this rank's tiles and an owner's blocks: int64 [V] into [N, all J] flattened."""
        if owner not in self._wanted:
            tiles, blocks = self._pairs(self._me, owner)
            self._wanted[owner] = tiles * self._num_blocks + self.blocks_on_device[owner][blocks]
        return self._wanted[owner]

    def asked(self, requester: int) -> Tensor:
        """Pairs of a requester's tiles and the blocks here: int64 [V] into [N, J] flattened."""
        if requester not in self._asked:
            tiles, blocks = self._pairs(requester, self._me)
            self._asked[requester] = tiles * len(self.blocks[self._me]) + blocks
        return self._asked[requester]

    def _pairs(self, requester: int, owner: int) -> tuple[Tensor, Tensor]:
        """Indices of tiles and blocks."""
        seen_NJ = self.blocks_on_device[owner] <= self.tiles_on_device[requester][:, None]
        pairs_V2 = torch.nonzero_static(seen_NJ, size=self.num_pairs(requester, owner))
        return pairs_V2[:, 0], pairs_V2[:, 1]
