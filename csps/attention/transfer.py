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
import torch.nn.functional as F
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


def micro_partitions(num_kv_heads: int, num_ranks: int) -> tuple[MicroPartition, ...]:
    """By KV-head group; by tiles for a single head. A rank alone has nothing to overlap."""
    if num_ranks == 1:
        return (MicroPartition(range(num_kv_heads), 0, 1),)
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


class Demand(NamedTuple):
    """What a requester's choice wants of an owner, on the host; S ranges of tiles.

    `blocks` [S, K, J]: wanted by any tile; `tiles` [K, N]: want any block; both bool. `pairs`
    [S, K]: how many (tile, block) pairs are kept.
    """

    blocks: np.ndarray
    tiles: np.ndarray
    pairs: np.ndarray


def read_demands(keeps_KNJ: Sequence[Tensor], partitions: Sequence[MicroPartition]) -> list[Demand]:
    """Of every choice (bool, on the device) its Demand, in one copy to the host."""
    parts = []
    for keep_KNJ in keeps_KNJ:
        ranges = {p.tile_range: p.tiles(keep_KNJ.shape[1]) for p in partitions}
        by_range = [keep_KNJ[:, tiles] for tiles in ranges.values()]
        parts += [
            torch.stack([keep.any(1) for keep in by_range]).int(),
            keep_KNJ.any(2).int(),
            torch.stack([keep.sum((1, 2), dtype=torch.int32) for keep in by_range]),
        ]
    if not parts:
        return []
    packed = torch.cat([part.flatten() for part in parts]).cpu()
    on_host = [
        values.view(part.shape).numpy()
        for values, part in zip(packed.split([p.numel() for p in parts]), parts, strict=True)
    ]
    return [
        Demand(blocks.astype(bool), tiles.astype(bool), pairs)
        for blocks, tiles, pairs in zip(on_host[::3], on_host[1::3], on_host[2::3], strict=True)
    ]


class Fetch(NamedTuple):
    """What one requester gets from one owner in one micro-partition.

    `blocks[i]`: blocks of the partition's i-th head that travel, as indices into the owner's
    J; `tiles[i]`: tiles of that head whose queries travel, as indices into the requester's N.
    Of the two at most one is not empty. Of the pairs that are kept `fetched_pairs` are attended
    to by the requester, `shipped_pairs` by the owner.
    """

    blocks: tuple[np.ndarray, ...]
    tiles: tuple[np.ndarray, ...]
    fetched_pairs: int
    shipped_pairs: int

    @property
    def num_blocks(self) -> int:
        return sum(map(len, self.blocks))

    @property
    def num_tiles(self) -> int:
        return sum(map(len, self.tiles))


def plan_fetches(
    demand: Demand, partitions: Sequence[MicroPartition], shape: KVShape
) -> list[Fetch]:
    """One Fetch per micro-partition. A block travels once, in the first that wants it."""
    passes_q_K = _passes_q(demand, shape)
    nothing = np.empty(0, dtype=np.int64)
    sent_KJ = np.zeros(demand.blocks.shape[1:], dtype=bool)
    fetches = []
    for partition in partitions:
        tiles = partition.tiles(demand.tiles.shape[1])
        blocks, shipped = [], []
        for head in partition.heads:
            if passes_q_K[head]:
                blocks.append(nothing)
                shipped.append(np.flatnonzero(demand.tiles[head, tiles]) + tiles.start)
            else:
                wanted_J = demand.blocks[partition.tile_range, head] & ~sent_KJ[head]
                sent_KJ[head] |= wanted_J
                blocks.append(np.flatnonzero(wanted_J))
                shipped.append(nothing)
        heads = slice(partition.heads.start, partition.heads.stop)
        pairs_K = demand.pairs[partition.tile_range, heads]
        shipped_pairs = int(pairs_K[passes_q_K[heads]].sum())
        fetched_pairs = int(pairs_K.sum()) - shipped_pairs
        fetches.append(Fetch(tuple(blocks), tuple(shipped), fetched_pairs, shipped_pairs))
    return fetches


def _passes_q(demand: Demand, shape: KVShape) -> np.ndarray:
    """KV heads whose queries are fewer bytes than the blocks they want: bool [K]."""
    kv_bytes = demand.blocks.any(0).sum(1) * shape.block_bytes
    q_bytes = demand.tiles.sum(1) * shape.tile_bytes
    return q_bytes < kv_bytes


def pack_bits(flags: Tensor) -> Tensor:
    """Flags, in order, as uint8 of 8 each; the last one padded."""
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=flags.device)
    padded = F.pad(flags.flatten(), (0, -flags.numel() % 8))
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, num_flags: int) -> Tensor:
    """Inverse of `pack_bits`: bool."""
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, None] & weights).bool().flatten()[:num_flags]


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
