"""Random tokens that kernels are tried on: queries, and a pool of keys and values.

Suffixes: T tokens, H query heads, K KV heads, G query heads of a KV head, D head dim, I items (a
tile of a KV head), N tiles, B tokens of a page.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csps.attention.transfer import KVShape
from csps.engine.kv_pool import KVPool


class TrialSize(NamedTuple):
    """Tokens of a dense prompt; tiles, and pages of each; rows of a decode step, and of each."""

    num_tokens: int
    num_tiles: int
    pages_per_tile: int
    num_rows: int
    pages_per_row: int


@dataclass(frozen=True, slots=True)
class Inputs:
    """Queries, and keys and values in the pool of one layer. Token t of a prompt has slot t."""

    size: TrialSize
    page_size: int
    num_pages: int
    store: KVPool
    q_TKGD: Tensor

    def queries(self) -> Tensor:
        """[T, H, D]."""
        return self.q_TKGD.flatten(1, 2)

    def tiles(self) -> Tensor:
        """Queries of the first tiles, by KV head: [I, G, B, D]."""
        tiles_TKGD = self.q_TKGD[: self.size.num_tiles * self.page_size]
        tiles_NBKGD = tiles_TKGD.unflatten(0, (-1, self.page_size))
        return tiles_NBKGD.permute(2, 0, 3, 1, 4).flatten(0, 1).contiguous()

    def tile_pages(self) -> np.ndarray:
        """Flat pages of the first tiles' own tokens, [K, N]."""
        tiles = np.arange(self.size.num_tiles)
        return np.stack([self.store.flat_pages(0, k, tiles) for k in range(self.q_TKGD.shape[1])])

    def empty_store(self) -> KVPool:
        """Such a pool, for a phase that writes to it; nothing is in it yet."""
        _, num_kv_heads, _, head_dim = self.q_TKGD.shape
        keys = self.store.flat_keys
        return _pool(
            self.num_pages, self.page_size, num_kv_heads, head_dim, keys.dtype, keys.device
        )

    def in_fp32(self) -> "Inputs":
        """The same numbers, on the CPU."""
        _, num_kv_heads, _, head_dim = self.q_TKGD.shape
        host = torch.device("cpu")
        pool = _pool(self.num_pages, self.page_size, num_kv_heads, head_dim, torch.float32, host)
        pool.flat_keys.copy_(self.store.flat_keys)
        pool.flat_values.copy_(self.store.flat_values)
        return replace(self, store=pool, q_TKGD=self.q_TKGD.to("cpu", torch.float32))


def random_inputs(
    shape: KVShape, num_kv_heads: int, size: TrialSize, device: torch.device
) -> Inputs:
    """Normal, of a fixed seed."""
    size = size._replace(num_tokens=-(-size.num_tokens // shape.block_size) * shape.block_size)
    num_pages = max(
        size.num_tokens // shape.block_size,
        size.num_tiles,
        size.pages_per_tile,
        size.num_rows * size.pages_per_row,
    )
    store = _pool(num_pages, shape.block_size, num_kv_heads, shape.head_dim, shape.dtype, device)
    num_queries = max(size.num_tokens, size.num_tiles * shape.block_size, size.num_rows)
    q_TKGD = store.flat_keys.new_empty(num_queries, num_kv_heads, shape.group_size, shape.head_dim)
    generator = torch.Generator(device).manual_seed(0)
    for x in (store.flat_keys, store.flat_values, q_TKGD):
        x.normal_(generator=generator)
    return Inputs(size, shape.block_size, num_pages, store, q_TKGD)


def _pool(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVPool:
    return KVPool(
        num_layers=1,
        num_pages=num_pages,
        block_size=page_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        staging_blocks=0,
        dtype=dtype,
        device=device,
    )
