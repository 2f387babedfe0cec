"""What all layers of one sequence's sparse prefill share, and what they do with pages.

Suffixes: K KV heads, N tiles, R rows of an item, J blocks, I items (a KV head and a tile), D
head dim.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from csps.attention.backends import Kernels, PageLists
from csps.attention.kv import KVStore
from csps.attention.select import RowSampler
from csps.attention.shards import SparseSequence
from csps.attention.sight import Sight
from csps.attention.transfer import KVShape, MicroPartition
from csps.core.attention import CsaConfig
from csps.parallel.packets import Packets, Part, Slot
from csps.parallel.upload import upload


@dataclass(frozen=True, slots=True)
class SparseContext:
    """One sequence of a prefill step on one rank; `first_head` is this rank's first KV head.

    `last_owner`: rank that computes the prompt's last tile, -1 if a later step does.
    """

    seq: SparseSequence
    sight: Sight
    sampler: RowSampler
    store: KVStore
    packets: Packets
    kernels: Kernels
    config: CsaConfig
    shape: KVShape
    num_kv_heads: int
    first_head: int
    partitions: tuple[MicroPartition, ...]
    last_owner: int

    @property
    def me(self) -> int:
        return self.packets.rank

    @property
    def device(self) -> torch.device:
        return self.store.flat_keys.device

    @property
    def peers(self) -> tuple[int, ...]:
        return tuple(rank for rank in self.sight.ranks if rank != self.me)

    @property
    def last_rows(self) -> int:
        """Queries of the prompt's last tile."""
        return self.seq.tile_rows(self.seq.last_tile)

    @property
    def own_rows(self) -> slice:
        """This rank's rows of the sequence in the batch."""
        seq = self.seq
        tiles = seq.tiles[self.me]
        count = len(tiles) * seq.block_size
        if len(tiles):  # only the last one may be partly filled
            count += seq.tile_rows(int(tiles[-1])) - seq.block_size
        return slice(seq.first_row, seq.first_row + count)

    def own_pages(self, layer: int) -> np.ndarray:
        """Flat pages of this rank's blocks: [K, J]."""
        flat, pages = self.store.flat_pages, self.seq.pages
        return np.stack([flat(layer, head, pages) for head in range(self.num_kv_heads)])

    def page_table(self, layer: int) -> Tensor:
        """Flat page of every block, in the pool or where it is staged: int64 [K, J]."""
        blocks = np.arange(self.seq.num_blocks)
        staged = [self.store.staging_pages(head, blocks) for head in range(self.num_kv_heads)]
        table = np.stack(staged)
        table[:, self.seq.blocks[self.me]] = self.own_pages(layer)
        (on_device,) = upload([table.ravel()], self.device)
        return on_device.view(table.shape)

    def attend(self, q_IRD: Tensor, lists: PageLists) -> tuple[Tensor, Tensor]:
        """Block-sparse attention over flat pages; see `BlockSparse`."""
        return self.kernels.block_sparse(q_IRD, self.store.flat_keys, self.store.flat_values, lists)

    def partial_parts(self, q_IRD: Tensor, lists: PageLists) -> list[Part]:
        """(o, lse) of shipped queries, ready to travel in the model's dtype."""
        o_IRD, lse_IR = self.attend(q_IRD, lists)
        return [Part("partial", o_IRD.to(self.shape.dtype)), Part("partial", lse_IR)]

    def partial_slots(self, *shape_IRD: int) -> list[Slot]:
        """What `partial_parts` looks like."""
        return [
            Slot("partial", shape_IRD, self.shape.dtype),
            Slot("partial", shape_IRD[:-1], torch.float32),
        ]


def page_lists(keep_KNJ: Tensor, pages_KJ: Tensor, num_pairs: int) -> PageLists:
    """Items in the order (head, tile), each with the pages of the blocks it keeps.

    `num_pairs`: as many as are kept; the host does not wait to count them.
    """
    num_items = keep_KNJ.shape[0] * keep_KNJ.shape[1]
    starts = torch.zeros(num_items + 1, dtype=torch.int32, device=keep_KNJ.device)
    torch.cumsum(keep_KNJ.sum(2, dtype=torch.int32).flatten(), 0, out=starts[1:])
    heads, _, blocks = torch.nonzero_static(keep_KNJ, size=num_pairs).unbind(1)
    return PageLists(starts, pages_KJ[heads, blocks].int(), longest=keep_KNJ.shape[2])
