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
    pack_bits,
    plan_fetches,
    read_demands,
    read_kv,
    unpack_bits,
)
from csps.parallel.packets import Arrival, Part, Slot
from csps.parallel.upload import upload


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
            context.kernels,
            context.config,
            self._layer,
            context.first_head,
        )
        last = LastTile(context, self._layer, self._q_KNGBD)
        own = context.sight.blocks_on_device[context.me]
        keys = BlockKeys(context.store.flat_keys, self._table_KJ[:, own])
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
        keep, outgoing, incoming = self._choice.keep, {}, {}
        for peer in context.peers:
            wanted = keep.flatten(1, 2).index_select(1, sight.wanted(peer))
            outgoing[peer] = [Part("bitmap", pack_bits(wanted))]
            num_bits = context.num_kv_heads * sight.num_pairs(peer, me)
            incoming[peer] = [Slot("bitmap", (-(-num_bits // 8),), torch.uint8)]
        bitmaps = context.packets.post(outgoing, incoming, self._device).wait()
        self._asked = {peer: self._read_bitmap(peer, bits) for peer, (bits,) in bitmaps.items()}
        blocks_J = torch.arange(keep.shape[2], device=self._device)
        # The diagonal is computed already.
        self._keep = keep & (blocks_J != sight.tiles_on_device[me][:, None])
        by_owner = [self._keep[:, :, sight.blocks_on_device[r]] for r in (me, *context.peers)]
        self._own, *demands = read_demands([*by_owner, *self._asked.values()], context.partitions)
        plans = [plan_fetches(demand, context.partitions, context.shape) for demand in demands]
        self._wanted = dict(zip(context.peers, plans, strict=False))
        self._given = dict(zip(self._asked, plans[len(context.peers) :], strict=True))
        self._fetches = [self._post_fetch(index) for index in range(len(context.partitions))]

    def _read_bitmap(self, requester: int, bits: Tensor) -> Tensor:
        """What a requester keeps of the blocks here: bool [K, N, J]."""
        sight, heads = self._context.sight, self._context.num_kv_heads
        pairs = sight.asked(requester)
        shape = len(sight.tiles[requester]), len(sight.blocks[self._context.me])
        keep = torch.zeros(heads, *shape, dtype=torch.bool, device=self._device)
        flags = unpack_bits(bits, heads * len(pairs)).view(heads, -1)
        keep.flatten(1, 2).index_copy_(1, pairs, flags)
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
        at = self._pages(index, given, context.me)
        store = context.store
        return kv_parts(store.flat_keys[at], store.flat_values[at], context.shape.wire)

    def _pages(self, index: int, fetch: Fetch, owner: int) -> Tensor:
        """Where the blocks that travel lie, or are staged."""
        heads, columns = _flat(self._context.partitions[index].heads, fetch.blocks)
        blocks = self._context.sight.blocks[owner][columns]
        at = upload([heads, blocks], self._device)
        return self._table_KJ[at[0], at[1]]

    def _items(self, index: int, fetch: Fetch) -> tuple[Tensor, Tensor]:
        """KV head and tile of each item whose queries travel."""
        items = _flat(self._context.partitions[index].heads, fetch.tiles)
        heads, tiles = upload(items, self._device)
        return heads, tiles

    # Phases attend and out

    def _attend(self) -> None:
        """All partitions; the first one's local blocks while its remote ones travel."""
        context, keep = self._context, self._keep
        for owner, plan in self._wanted.items():
            for partition, fetch in zip(context.partitions, plan, strict=True):
                for head, shipped in zip(partition.heads, fetch.tiles, strict=True):
                    if len(shipped):  # the owner attends for them
                        keep[head].index_fill_(1, context.sight.blocks_on_device[owner], False)
        own = context.sight.blocks_on_device[context.me]
        local = torch.zeros(keep.shape[2], dtype=torch.bool, device=self._device)
        # Filled, not assigned: a number of the host's would be copied there, and waited for.
        local.index_fill_(0, own, True)
        self._returns = []
        for index, partition in enumerate(context.partitions):
            heads = slice(partition.heads.start, partition.heads.stop)
            num_local = int(self._own.pairs[partition.tile_range, heads].sum())
            num_remote = sum(plan[index].fetched_pairs for plan in self._wanted.values())
            if index == 0 and context.peers:
                self._attend_pages(partition, keep & local, num_local)
                self._receive(index)
                self._attend_pages(partition, keep & ~local, num_remote)
            else:
                self._receive(index)
                self._attend_pages(partition, keep, num_local + num_remote)

    def _attend_pages(self, partition: MicroPartition, keep_KNJ: Tensor, num_pairs: int) -> None:
        heads = slice(partition.heads.start, partition.heads.stop)
        tiles = partition.tiles(self._num_tiles)
        q_KNRD = self._q_KNGBD[heads, tiles].flatten(2, 3)
        if not q_KNRD.shape[1]:
            return
        lists = page_lists(keep_KNJ[heads, tiles], self._table_KJ[heads], num_pairs)
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
        at = self._pages(index, self._wanted[owner][index], owner)
        keys, values = read_kv(parts, context.shape)
        context.store.flat_keys.index_copy_(0, at, keys)
        context.store.flat_values.index_copy_(0, at, values)

    def _answer(self, index: int, requester: int, q_IGBD: Tensor) -> list[Part]:
        """Attend for shipped queries over the blocks here that their tiles chose."""
        context = self._context
        fetch = self._given[requester][index]
        heads, tiles = self._items(index, fetch)
        keep_IJ = self._asked[requester][heads, tiles]
        pages_IJ = self._table_KJ[:, context.sight.blocks_on_device[context.me]][heads]
        lists = page_lists(keep_IJ.unsqueeze(1), pages_IJ, fetch.shipped_pairs)
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
