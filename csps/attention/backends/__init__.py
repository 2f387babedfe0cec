"""Kernels behind interfaces: contiguous keys, pages, and the diagonal of tiles."""

from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor


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
    """Pages of each item, one list behind the other (CSR), both int64.

    Item i attends to pages[starts[i] : starts[i + 1]].
    """

    starts: np.ndarray  # [I + 1]
    pages: np.ndarray

    @property
    def num_items(self) -> int:
        return len(self.starts) - 1

    def of(self, item: int) -> np.ndarray:
        return self.pages[self.starts[item] : self.starts[item + 1]]


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


class Kernels(NamedTuple):
    """What one device attends with."""

    partial: Partial
    block_sparse: BlockSparse
    diagonal: Diagonal
