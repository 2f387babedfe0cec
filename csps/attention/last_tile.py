"""The prompt's last tile is exact: its queries go to every owner.

That is less than fetching for it (it wants most blocks, and is one tile), and what it retrieves
is what the first token says.

Suffixes: K KV heads, N tiles, G query heads per KV head, B tokens of a tile, R = G * rows, D
head dim, J blocks.
"""

import numpy as np
from torch import Tensor

from csps.attention.backends import PageLists
from csps.attention.merge import merge_into
from csps.attention.sparse_context import SparseContext
from csps.parallel.packets import Part, Slot
from csps.parallel.upload import upload


class LastTile:
    """One layer's last tile. Does nothing where the step does not end the prompt.

    Every rank that holds blocks calls the methods in the order they stand.
    """

    def __init__(self, context: SparseContext, layer: int, q_KNGBD: Tensor) -> None:
        self._context, self._layer = context, layer
        self._is_here = context.last_owner == context.me
        self._device = q_KNGBD.device
        if self._is_here:
            self._q_KRD = q_KNGBD[:, -1, :, : context.last_rows].flatten(1, 2)

    def post_queries(self) -> None:
        """Ship the queries, or expect them."""
        context = self._context
        outgoing, incoming = {}, {}
        if self._is_here:
            outgoing = {key: [Part("query", self._q_KRD)] for key in context.peers}
        elif context.last_owner >= 0:
            incoming = {context.last_owner: [Slot("query", self._shape, context.shape.dtype)]}
        self._queries = context.packets.post(outgoing, incoming, self._device)

    def answer(self) -> None:
        """Post partials over every block here, or expect those of the other owners."""
        context = self._context
        outgoing, incoming = {}, {}
        if self._is_here:
            incoming = dict.fromkeys(context.peers, context.partial_slots(*self._shape))
        elif context.last_owner >= 0:
            (q_KRD,) = self._queries.wait()[context.last_owner]
            outgoing = {context.last_owner: context.partial_parts(q_KRD, self._pages())}
        self._partials = context.packets.post(outgoing, incoming, self._device)

    def attend(self, o_KNRD: Tensor, lse_KNR: Tensor) -> None:
        """Merge this rank's own blocks and the answers into the accumulators."""
        if not self._is_here:
            return
        self._merge(o_KNRD, lse_KNR, *self._context.attend(self._q_KRD, self._pages()))
        for o_KRD, lse_KR in self._partials.wait().values():
            self._merge(o_KNRD, lse_KNR, o_KRD, lse_KR)

    @property
    def _shape(self) -> tuple[int, int, int]:
        context = self._context
        rows = context.shape.group_size * context.last_rows
        return context.num_kv_heads, rows, context.shape.head_dim

    def _pages(self) -> PageLists:
        """Every block here but the tile's own, which is the diagonal."""
        context = self._context
        blocks = context.seq.blocks[context.me]
        pages_KJ = context.own_pages(self._layer)[:, blocks != context.seq.last_tile]
        num_items, length = pages_KJ.shape
        lists = np.arange(num_items + 1) * length, pages_KJ.ravel()
        starts, pages = (part.int() for part in upload(lists, self._device))
        return PageLists(starts, pages, longest=length)

    def _merge(self, o_KNRD: Tensor, lse_KNR: Tensor, o_KRD: Tensor, lse_KR: Tensor) -> None:
        rows, group = self._context.last_rows, self._context.shape.group_size
        acc_KGBD = o_KNRD[:, -1].unflatten(1, (group, -1))[:, :, :rows]
        lse_KGB = lse_KNR[:, -1].unflatten(1, (group, -1))[:, :, :rows]
        split = (group, rows)
        merge_into(acc_KGBD, lse_KGB, o_KRD.unflatten(1, split), lse_KR.unflatten(1, split))
