"""Sparse prefill of one sequence in one layer, in three phases.

    in      sampled rows go to the KV owners, masses come back, blocks are chosen
            (csps.attention.selection), chosen remote blocks are fetched or queries shipped
    attend  block-sparse attention over local and fetched pages
    out     partial outputs of shipped queries return and are merged by log-sum-exp

Fetching, attending and returning go by micro-partitions (KV-head groups: softmax is independent
between them): all fetches are under way while the first partition attends to its local blocks,
and a partition's partials return while the next one attends. The diagonal, this rank's own
scores and the prompt's last tile fill the waits of the selection.

Suffixes: K KV heads, N tiles of this rank, B tokens of a tile, G query heads per KV head, D head
dim, J blocks, R = G * B packed rows, I items (a KV head and a tile).
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from csps.attention.last_tile import LastTile
from csps.attention.merge import merge_into
from csps.attention.score import BlockKeys
from csps.attention.selection import Choice, Selection
from csps.attention.sparse_context import SparseContext, page_lists
from csps.attention.transfer import (
    Fetch,
    MicroPartition,
    kv_parts,
    kv_slots,
    plan_fetches,
    read_kv,
)
from csps.parallel.packets import Arrival, Part, Slot


class SparseLayer:
    """One layer; `run` fills the sequence's rows. Its K and V are in the store already."""

    def __init__(
        self, context: SparseContext, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor
    ) -> None:
        self._context, self._layer = context, layer
        self._device = q_THD.device
        self._num_tiles = len(context.sight.tiles[context.me])
        q_NBHD, k_NBKD, v_NBKD = (self._tiles(x) for x in (q_THD, k_TKD, v_TKD))
        self._q_NBKGD = q_NBHD.unflatten(2, (context.num_kv_heads, -1))
        # Rows of an item lie together.
        self._q_KNGBD = self._q_NBKGD.permute(2, 0, 3, 1, 4).contiguous()
        self._k_KNBD, self._v_KNBD = (x.permute(2, 0, 1, 3) for x in (k_NBKD, v_NBKD))
        self._table_KJ = context.page_table(layer)

    def run(self, out_THD: Tensor) -> tuple[Choice, int]:
        """Fill `out_THD`; returns the choice and how many blocks were fetched."""
        self._select()
        self._post_fetches()
        self._attend()
        self._merge_partials()
        self._store_output(out_THD)
        return self._choice, sum(f.num_blocks for plan in self._wanted.values() for f in plan)

    def _tiles(self, x_THD: Tensor) -> Tensor:
        """This rank's rows of the sequence as tiles [N, B, H, D]; the last one padded."""
        rows = x_THD[self._context.own_rows]
        padding = -len(rows) % self._context.seq.block_size
        if padding:
            rows = F.pad(rows, (0, 0, 0, 0, 0, padding))
        return rows.unflatten(0, (-1, self._context.seq.block_size))

    # Phase in: what to fetch

    def _select(self) -> None:
        context = self._context
        selection = Selection(
            context.seq,
            context.sight,
            context.sampler,
            context.packets,
            context.kernels.score,
            context.config,
            self._layer,
            context.first_head,
        )
        last = LastTile(context, self._layer, self._q_KNGBD)
        keys = BlockKeys(context.store.flat_keys, context.own_pages(self._layer))
        selection.post_rows(self._q_NBKGD[: self._num_tiles], keys)
        last.post_queries()
        self._start_output()
        selection.score_own()
        selection.post_lse()
        last.answer()
        selection.post_mass()
        last.attend(self._o_KNRD, self._lse_KNR)
        tiles = slice(0, self._num_tiles)
        selection.post_votes(self._q_KNGBD[:, tiles].flatten(2, 3), self._lse_KNR[:, tiles])
        self._choice = selection.decide()

    def _start_output(self) -> None:
        """The diagonals open the accumulators o [K, N, R, D] and lse [K, N, R], fp32."""
        o_IGBD, lse_IGB = self._context.kernels.diagonal(
            *(x.flatten(0, 1) for x in (self._q_KNGBD, self._k_KNBD, self._v_KNBD))
        )
        heads_and_tiles = self._q_KNGBD.shape[:2]
        self._o_KNRD = o_IGBD.float().flatten(1, 2).unflatten(0, heads_and_tiles)
        self._lse_KNR = lse_IGB.flatten(1, 2).unflatten(0, heads_and_tiles).contiguous()

    # Phase in: fetching

    def _post_fetches(self) -> None:
        """Tell the owners what was chosen; post every partition's blocks and queries."""
        context, sight, me = self._context, self._context.sight, self._context.me
        keeps = {owner: self._choice.keep[:, :, sight.blocks[owner]] for owner in context.peers}
        outgoing, incoming = {}, {}
        for peer, keep in keeps.items():
            bits = np.packbits(keep[:, sight.pairs(me, peer)])
            outgoing[peer] = [Part("bitmap", torch.from_numpy(bits).to(self._device))]
            num_bits = context.num_kv_heads * int(sight.pairs(peer, me).sum())
            incoming[peer] = [Slot("bitmap", (-(-num_bits // 8),), torch.uint8)]
        bitmaps = context.packets.post(outgoing, incoming, self._device).wait()
        self._asked = {
            peer: self._read_bitmap(peer, bits.cpu().numpy()) for peer, (bits,) in bitmaps.items()
        }
        self._wanted = {owner: self._plan(keep) for owner, keep in keeps.items()}
        self._given = {peer: self._plan(keep) for peer, keep in self._asked.items()}
        self._fetches = [self._post_fetch(index) for index in range(len(context.partitions))]

    def _plan(self, keep_KNJ: np.ndarray) -> list[Fetch]:
        return plan_fetches(keep_KNJ, self._context.partitions, self._context.shape)

    def _read_bitmap(self, requester: int, bits: np.ndarray) -> np.ndarray:
        """What a requester keeps of the blocks here: bool [K, N, J]."""
        pairs = self._context.sight.pairs(requester, self._context.me)
        heads = self._context.num_kv_heads
        keep = np.zeros((heads, *pairs.shape), dtype=bool)
        unpacked = np.unpackbits(bits, count=heads * int(pairs.sum()))
        keep[:, pairs] = unpacked.reshape(heads, -1).astype(bool)
        return keep

    def _post_fetch(self, index: int) -> Arrival:
        """One message per peer: blocks it asked for, and queries for blocks it has."""
        context = self._context
        outgoing, incoming = {}, {}
        for peer in context.peers:
            given, wanted = self._given[peer][index], self._wanted[peer][index]
            outgoing[peer] = [
                *self._block_parts(index, given),
                Part("query", self._q_KNGBD[self._items(index, wanted)]),
            ]
            shipped = (given.num_tiles, *self._q_KNGBD.shape[2:])
            incoming[peer] = [
                *kv_slots(wanted.num_blocks, context.shape),
                Slot("query", shipped, self._q_KNGBD.dtype),
            ]
        return context.packets.post(outgoing, incoming, self._device)

    def _block_parts(self, index: int, given: Fetch) -> list[Part]:
        context = self._context
        heads, columns = _flat(context.partitions[index].heads, given.blocks)
        blocks = context.sight.blocks[context.me][columns]
        at = torch.from_numpy(self._table_KJ[heads, blocks]).to(self._device)
        store = context.store
        return kv_parts(store.flat_keys[at], store.flat_values[at], context.shape.wire)

    def _items(self, index: int, fetch: Fetch) -> tuple[Tensor, Tensor]:
        """KV head and tile of each item whose queries travel."""
        heads, tiles = _flat(self._context.partitions[index].heads, fetch.tiles)
        return torch.from_numpy(heads).to(self._device), torch.from_numpy(tiles).to(self._device)

    # Phases attend and out

    def _attend(self) -> None:
        """All partitions; the first one's local blocks while its remote ones travel."""
        context = self._context
        tiles, num_blocks = context.sight.tiles[context.me], context.seq.num_blocks
        keep = self._choice.keep & (np.arange(num_blocks) != tiles[:, None])
        for owner, plan in self._wanted.items():
            for partition, fetch in zip(context.partitions, plan, strict=True):
                for head, shipped in zip(partition.heads, fetch.tiles, strict=True):
                    # The owner attends for them.
                    keep[np.ix_([head], shipped, context.sight.blocks[owner])] = False
        local = np.zeros(num_blocks, dtype=bool)
        local[context.seq.blocks[context.me]] = True
        self._returns = []
        for index, partition in enumerate(context.partitions):
            if index == 0 and context.peers:
                self._attend_pages(partition, keep & local)
                self._receive(index)
                self._attend_pages(partition, keep & ~local)
            else:
                self._receive(index)
                self._attend_pages(partition, keep)

    def _attend_pages(self, partition: MicroPartition, keep_KNJ: np.ndarray) -> None:
        heads = slice(partition.heads.start, partition.heads.stop)
        tiles = partition.tiles(self._num_tiles)
        q_KNRD = self._q_KNGBD[heads, tiles].flatten(2, 3)
        if not q_KNRD.shape[1]:
            return
        lists = page_lists(keep_KNJ[heads, tiles], self._table_KJ[heads], self._device)
        o_IRD, lse_IR = self._context.attend(q_KNRD.flatten(0, 1), lists)
        merge_into(
            self._o_KNRD[heads, tiles],
            self._lse_KNR[heads, tiles],
            o_IRD.view(q_KNRD.shape),
            lse_IR.view(q_KNRD.shape[:3]),
        )

    def _receive(self, index: int) -> None:
        """Stage a partition's blocks; attend for the peers that shipped queries, and reply."""
        context = self._context
        outgoing, incoming = {}, {}
        for peer, parts in self._fetches[index].wait().items():
            self._stage(index, peer, parts[:-1])
            outgoing[peer] = self._answer(index, peer, parts[-1])
            rows = self._q_KNGBD.shape[2] * context.seq.block_size
            num_items = self._wanted[peer][index].num_tiles
            incoming[peer] = context.partial_slots(num_items, rows, context.shape.head_dim)
        self._returns.append(context.packets.post(outgoing, incoming, self._device))

    def _stage(self, index: int, owner: int, parts: Sequence[Tensor]) -> None:
        """Put fetched blocks where the page table says."""
        context = self._context
        heads, columns = _flat(context.partitions[index].heads, self._wanted[owner][index].blocks)
        pages = self._table_KJ[heads, context.sight.blocks[owner][columns]]
        keys, values = read_kv(parts, context.shape)
        at = torch.from_numpy(pages).to(self._device)
        context.store.flat_keys.index_copy_(0, at, keys)
        context.store.flat_values.index_copy_(0, at, values)

    def _answer(self, index: int, requester: int, q_IGBD: Tensor) -> list[Part]:
        """Attend for shipped queries over the blocks here that their tiles chose."""
        context = self._context
        fetch = self._given[requester][index]
        heads, tiles = _flat(context.partitions[index].heads, fetch.tiles)
        keep_IJ = self._asked[requester][heads, tiles]
        pages_IJ = self._table_KJ[heads[:, None], context.sight.blocks[context.me]]
        lists = page_lists(keep_IJ[:, None], pages_IJ, self._device)
        return context.partial_parts(q_IGBD.flatten(1, 2), lists)

    def _merge_partials(self) -> None:
        """What owners computed for shipped queries."""
        for index, arrival in enumerate(self._returns):
            for owner, (o_IRD, lse_IR) in arrival.wait().items():
                items = self._items(index, self._wanted[owner][index])
                merged, merged_lse = self._o_KNRD[items], self._lse_KNR[items]
                merge_into(merged, merged_lse, o_IRD, lse_IR)
                self._o_KNRD[items], self._lse_KNR[items] = merged, merged_lse

    def _store_output(self, out_THD: Tensor) -> None:
        size, rows = self._context.seq.block_size, self._context.own_rows
        o_NBHD = self._o_KNRD.unflatten(2, (-1, size)).permute(1, 3, 0, 2, 4).flatten(2, 3)
        out_THD[rows] = o_NBHD.flatten(0, 1)[: rows.stop - rows.start].to(out_THD.dtype)


def _flat(heads: range, lists: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Lists by head as (head, element) pairs, one behind the other."""
    lengths = [len(elements) for elements in lists]
    return np.repeat(np.asarray(heads), lengths), np.concatenate(lists)
