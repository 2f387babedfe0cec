"""Who sends which blocks to whom: derived alike by both ends from the requester's choice.

A rank that needs blocks of an owner gets them for its own queries (pass-KV), or ships the
queries and gets partial outputs (pass-Q), per KV head, whichever is fewer bytes.

Suffixes: K KV heads, N tiles of the requester, J blocks of the owner, B tokens, D head dim,
X blocks that travel.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csps.attention.int8 import dequantize, quantize
from csps.core.attention import Wire
from csps.parallel.packets import Part, Slot

MAX_HEAD_GROUPS = 4
TILE_RANGES = 2


class MicroPartition(NamedTuple):
    """What goes through the three phases as one: a range of KV heads, a range of tiles.

    Ranges of tiles exist where there are too few heads to overlap anything.
    """

    heads: range
    tile_range: int
    num_tile_ranges: int

    def tiles(self, num_tiles: int) -> slice:
        """This partition's share of a requester's tiles."""
        cut = [num_tiles * i // self.num_tile_ranges for i in range(self.num_tile_ranges + 1)]
        return slice(cut[self.tile_range], cut[self.tile_range + 1])


def micro_partitions(num_kv_heads: int) -> tuple[MicroPartition, ...]:
    """By KV-head group; by tiles for a single head."""
    if num_kv_heads == 1:
        return tuple(MicroPartition(range(1), i, TILE_RANGES) for i in range(TILE_RANGES))
    groups = min(num_kv_heads, MAX_HEAD_GROUPS)
    cuts = [num_kv_heads * i // groups for i in range(groups + 1)]
    return tuple(MicroPartition(range(a, b), 0, 1) for a, b in itertools.pairwise(cuts) if b > a)


@dataclass(frozen=True, slots=True)
class KVShape:
    """What a block and a tile weigh, on one rank."""

    block_size: int
    group_size: int
    head_dim: int
    dtype: torch.dtype
    wire: Wire

    @property
    def block_bytes(self) -> int:
        """K and V of one block and KV head on the wire."""
        if self.wire is Wire.INT8:
            return 2 * self.block_size * (self.head_dim + 2)
        return 2 * self.block_size * self.head_dim * self.dtype.itemsize

    @property
    def tile_bytes(self) -> int:
        """A tile's queries of one KV head, and the partial outputs that come back."""
        row = 2 * self.head_dim * self.dtype.itemsize + 4
        return self.group_size * self.block_size * row


class Fetch(NamedTuple):
    """What one requester gets from one owner in one micro-partition.

    `blocks[i]`: blocks of the partition's i-th head that travel, as indices into the owner's
    J; `tiles[i]`: tiles of that head whose queries travel, as indices into the requester's N.
    Of the two at most one is not empty.
    """

    blocks: tuple[np.ndarray, ...]
    tiles: tuple[np.ndarray, ...]

    @property
    def num_blocks(self) -> int:
        return sum(map(len, self.blocks))

    @property
    def num_tiles(self) -> int:
        return sum(map(len, self.tiles))


def plan_fetches(
    keep_KNJ: np.ndarray, partitions: Sequence[MicroPartition], shape: KVShape
) -> list[Fetch]:
    """One Fetch per micro-partition. A block travels once, in the first that wants it."""
    passes_q_K = _passes_q(keep_KNJ, shape)
    nothing = np.empty(0, dtype=np.int64)
    sent_KJ = np.zeros((keep_KNJ.shape[0], keep_KNJ.shape[2]), dtype=bool)
    fetches = []
    for partition in partitions:
        tiles = partition.tiles(keep_KNJ.shape[1])
        blocks, shipped = [], []
        for head in partition.heads:
            keep_NJ = keep_KNJ[head, tiles]
            if passes_q_K[head]:
                blocks.append(nothing)
                shipped.append(np.flatnonzero(keep_NJ.any(1)) + tiles.start)
            else:
                wanted_J = keep_NJ.any(0) & ~sent_KJ[head]
                sent_KJ[head] |= wanted_J
                blocks.append(np.flatnonzero(wanted_J))
                shipped.append(nothing)
        fetches.append(Fetch(tuple(blocks), tuple(shipped)))
    return fetches


def _passes_q(keep_KNJ: np.ndarray, shape: KVShape) -> np.ndarray:
    """KV heads whose queries are fewer bytes than the blocks they want: bool [K]."""
    kv_bytes = keep_KNJ.any(1).sum(1) * shape.block_bytes
    q_bytes = keep_KNJ.any(2).sum(1) * shape.tile_bytes
    return q_bytes < kv_bytes


# Keys and values as parts of a message


def kv_parts(k_XBD: Tensor, v_XBD: Tensor, wire: Wire) -> list[Part]:
    """Blocks as they travel; see `kv_slots`."""
    if wire is Wire.MODEL:
        return [Part("kv", k_XBD), Part("kv", v_XBD)]
    return [Part("kv", part) for x in (k_XBD, v_XBD) for part in quantize(x)]


def kv_slots(num_blocks: int, shape: KVShape) -> list[Slot]:
    """What `kv_parts` of so many blocks looks like."""
    rows = (num_blocks, shape.block_size)
    if shape.wire is Wire.MODEL:
        return [Slot("kv", (*rows, shape.head_dim), shape.dtype)] * 2
    return [
        Slot("kv", (*rows, shape.head_dim), torch.int8),
        Slot("kv", rows, torch.float16),
    ] * 2


def read_kv(parts: Sequence[Tensor], shape: KVShape) -> tuple[Tensor, Tensor]:
    """K and V [X, B, D] in the model's dtype."""
    if shape.wire is Wire.MODEL:
        return parts[0], parts[1]
    keys, key_scale, values, value_scale = parts
    return (
        dequantize(keys, key_scale).to(shape.dtype),
        dequantize(values, value_scale).to(shape.dtype),
    )
