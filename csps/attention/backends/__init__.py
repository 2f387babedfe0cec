"""Kernels behind interfaces: rotation, attention of every kind, its merge, messages by head."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from csps.attention.kv import KVSlots, KVStore
from csps.attention.score import BlockKeys
from csps.attention.select import Rows
from csps.attention.shards import Run
from csps.core.heads import AxisHeads


class Partial(Protocol):
    """Attention of some rows over some keys, with what it takes to merge it."""

    def __call__(
        self, q_THD: Tensor, k_LHD: Tensor, v_LHD: Tensor, *, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Return (o [T, Hq, D] in q's dtype or fp32, lse [T, Hq] fp32, natural log).

        k, v are [L, Hkv, D] with L > 0, T > 0; Hq is a multiple of Hkv. `causal`: T == L and
        row i sees keys 0..i. Scale is 1 / sqrt(D).
        """
        ...


class PageLists(NamedTuple):
    """Pages of each item, one list behind the other (CSR), both int32, where the pages are.

    Item i attends to pages[starts[i] : starts[i + 1]]. No list has more than `longest` pages:
    that much the host knows without waiting for the device.
    """

    starts: Tensor  # [I + 1]
    pages: Tensor
    longest: int


class BlockSparse(Protocol):
    """Attention of items (rows that share a page list) over pages, each page whole."""

    def __call__(
        self, q_IRD: Tensor, k_PBD: Tensor, v_PBD: Tensor, lists: PageLists
    ) -> tuple[Tensor, Tensor]:
        """Return (o [I, R, D] in fp32 or q's dtype, lse [I, R] fp32, natural log).

        Rows are the query heads of one KV head packed behind one another. k, v are flat pages
        of B tokens. An item without pages has o = 0 and lse = -inf. Scale is 1 / sqrt(D).
        """
        ...


class Diagonal(Protocol):
    """Causal attention of many tiles, each over its own tokens."""

    def __call__(self, q_IGBD: Tensor, k_IBD: Tensor, v_IBD: Tensor) -> tuple[Tensor, Tensor]:
        """Return (o [I, G, B, D] in q's dtype or fp32, lse [I, G, B] fp32, natural log).

        Row b of an item sees keys 0..b; the G query heads share a KV head. I may be 0.
        """
        ...


class DecodeRows(Protocol):
    """Rows of one step, each a token with its shard; the same in every layer."""

    def __call__(self, layer: int, q_NHD: Tensor, o_NHD: Tensor, lse_NH: Tensor) -> None:
        """Fill o [N, H, D] (fp32 or q's dtype) and lse [N, H] (fp32, natural log).

        Rows of q, o and lse may lie apart, what is in a row may not. A row without keys has
        o = 0 and lse = -inf. Scale is 1 / sqrt(D).
        """
        ...


class PagedDecode(Protocol):
    """Attention of single tokens over the pages of their shards, in a store."""

    def __call__(self, store: KVStore, shards: Sequence[tuple[Run, ...]]) -> DecodeRows:
        """Prepare a step's rows: the work that all layers share is done here, once.

        Row i attends to `shards[i]`. A run begins with a page; only the last may end inside one.
        """
        ...


class FixedRows(DecodeRows, Protocol):
    """Rows of one step after the other, with tables that stay where they are on the device.

    What was launched for one step does the next one's work once its rows are loaded.
    """

    def load(self, shards: Sequence[tuple[Run, ...]]) -> None:
        """As of `PagedDecode`. Rows behind the last see no key."""
        ...


@runtime_checkable
class FixedDecode(Protocol):
    """What a `PagedDecode` is besides if CUDA graphs can run its steps."""

    def fixed(self, store: KVStore, num_rows: int) -> FixedRows:
        """Make room for steps of up to `num_rows` rows, none of which sees a key yet."""
        ...


class MergeRows(Protocol):
    """Merge of one step's partial outputs; the same in every layer."""

    def __call__(
        self, message_MB: Tensor, out_THD: Tensor, own: tuple[Tensor, Tensor] | None
    ) -> None:
        """Fill out [T, H, D] from packed rows (csps.attention.merge) of out's dtype.

        The sources' rows lie behind one another in `message_MB`. `own`: (o [T, H, D] fp32,
        lse [T, H] fp32) of all rows, o = 0 where it saw no key; merged with them and possibly
        overwritten. A row that nobody has keys for has out = 0.
        """
        ...


class Merge(Protocol):
    """Exact merge of packed partial outputs (see csps.attention.merge)."""

    def __call__(
        self, rows_by_source: Sequence[np.ndarray], num_rows: int, device: torch.device
    ) -> MergeRows:
        """Prepare a step: source s answers for rows_by_source[s], int64, each below num_rows."""
        ...


class RowScores(Protocol):
    """What sampled rows of N tiles see of one owner's J blocks."""

    @property
    def lse(self) -> Tensor:
        """[K, N, R] fp32, natural log, rows that choose before probes; -inf without a key."""
        ...

    def masses(self, total_lse_KNR: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
        """By block, fp32: the mean of the rows that choose [K, N, J], each probe's [K, N, J, E].

        `total_lse`: over the keys of all owners.
        """
        ...


class Score(Protocol):
    """Scores of sampled rows against one owner's keys (csps.attention.score)."""

    def __call__(
        self,
        rows: Rows,
        positions_KNR: Tensor,
        tiles_N: Tensor,
        keys: BlockKeys,
        blocks_J: Tensor,
    ) -> RowScores:
        """Score a requester's rows of `tiles` against the keys of `blocks`; both ascend, int64.

        Keys behind a row's position do not count. Probes are exact up to rounding.
        """
        ...


class Choose(Protocol):
    """Choice of the blocks that hold enough of each tile's estimated mass."""

    def __call__(self, mass_KNJ: Tensor, tiles_N: Tensor, gammas: Sequence[float]) -> list[Tensor]:
        """For each gamma bool [K, N, J]: those of csps.attention.select.keep_by_mass, each one."""
        ...


class RotateRows(Protocol):
    """Rotary embedding of one step's tokens; where their K and V are known, it stores them."""

    def __call__(self, layer: int, qk_TKGD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor]:
        """Return (q [T, H, D], k [T, K, D]): rotated, contiguous, in v's dtype.

        qk is [T, K, G + 1, D], each KV head's queries before its key; v may be strided, heads of
        qk and D not. There may be no token or no head.
        """
        ...


class Rotate(Protocol):
    """Rotary embedding: dimension i goes with i + D/2."""

    def __call__(self, table_PD: Tensor, positions_T: Tensor, slots: KVSlots | None) -> RotateRows:
        """Prepare a step: positions int64, `table` fp32, cos in [:, :D/2], sin behind it.

        K and V of row i go to `slots.slots_T[i]`, distinct but for the scratch page's; None:
        someone else stores them.
        """
        ...


class HeadMessages(Protocol):
    """Messages between the ranks of one axis, each about the heads of one of them.

    Rank p has h_p of the axis' H query heads and k_p of its K KV heads, either may be 0, and ranks
    may share a KV head. Its message [T, W_p, D] has its queries, keys and values side by side: W_p
    = h_p + 2 k_p. Those to the other ranks are contiguous and by rank; those from them lie behind
    one another in one buffer, in order of rank. This rank's own heads (h, k, W without p) are in
    no message. T may be 0. Ranks may have messages of different backends: what is in them is the
    same. Nothing waits for the device.
    """

    def pack_qkv(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, own_TWD: Tensor
    ) -> dict[int, Tensor]:
        """Everyone's heads of these tokens, to each other rank [T, W_p, D]; fills own [T, W, D].

        Only D must be contiguous, but all of `own`.
        """
        ...

    def own_qkv(self, q_ThD: Tensor, k_TkD: Tensor, v_TkD: Tensor) -> Tensor:
        """[T, W, D] of own heads, one message to all."""
        ...

    def unpack_qkv(self, received_MD: Tensor, own_TWD: Tensor) -> Tensor:
        """[T, H + 2 K, D], all heads of these tokens, from everyone's own_qkv.

        received [sum of T W_p, D]. Of a KV head that ranks share, any of theirs.
        """
        ...

    def pack_partials(self, o_NHD: Tensor, lse_NH: Tensor, own_NB: Tensor) -> dict[int, Tensor]:
        """Packed rows (csps.attention.merge) of everyone's heads; fills own [N, h (D e + 4)].

        To each other rank N h_p (D e + 4) bytes. o as `DecodeRows` fills it, lse fp32.
        """
        ...

    def unpack_outputs(self, received_MD: Tensor, own_ThD: Tensor) -> Tensor:
        """[T, H, D] of these tokens, from everyone's [T, h_p, D]: received [sum of T h_p, D]."""
        ...


class Messages(Protocol):
    """Messages by head: what steers the kernels is on the device once and for all."""

    def __call__(self, heads: AxisHeads, rank: int, device: torch.device) -> HeadMessages:
        """Prepare those of rank `rank` of the axis that has `heads`."""
        ...


class Kernels(NamedTuple):
    """What one device attends with."""

    rotate: Rotate
    partial: Partial
    block_sparse: BlockSparse
    diagonal: Diagonal
    score: Score
    choose: Choose
    paged_decode: PagedDecode
    merge: Merge
    messages: Messages
