"""This rank's KV: `num_pages` pages of `block_size` tokens, in all layers.

Who owns which page is the coordinator's ledger's business; here a page is only a place.
Slot = page * block_size + offset. Pages of a shard that follow each other are one run of
slots, so attention reads them in place.

Behind the last page is a scratch page that nobody owns: rows that only fill up a batch write there.

Sparse attention addresses *flat pages*: page p of layer l and KV head h is flat page
(l * KV heads + h) * num_pages + p. Behind them lie staging pages, for the blocks that one layer
fetches from other ranks: so its attention runs on one page table, wherever a block came from.
"""

import numpy as np
import torch
from torch import Tensor

from csps.attention.shards import Run


class KVPool:
    """Storage of K and V, each [layers, KV heads, pages * block_size, head dim] and the staging.

    Head-major: attention walks the keys of one head at a time, and on a CPU reads them a third
    faster when they lie together. Memory is touched when it is first written, so an idle pool
    costs little. `staging_blocks`: blocks of each KV head that can be staged at a time.
    `scratch_slot`: begins the scratch page.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        staging_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.scratch_slot = num_pages * block_size
        num_pages += 1
        self._num_pages, self._num_kv_heads = num_pages, num_kv_heads
        self._staging_blocks = staging_blocks
        resident = num_layers * num_kv_heads * num_pages
        self._first_staging = resident
        flat = (resident + num_kv_heads * staging_blocks, block_size, head_dim)
        self.flat_keys = torch.empty(flat, dtype=dtype, device=device)
        self.flat_values = torch.empty(flat, dtype=dtype, device=device)
        shape = (num_layers, num_kv_heads, num_pages * block_size, head_dim)
        self._keys = self.flat_keys[:resident].view(shape)
        self._values = self.flat_values[:resident].view(shape)
        keys, values = (x.unflatten(2, (num_pages, block_size)) for x in (self._keys, self._values))
        self._pages = list(zip(keys.unbind(), values.unbind(), strict=True))

    def write(self, layer: int, slots_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Store new tokens' K and V at their slots (int64)."""
        self._keys[layer].index_copy_(1, slots_T, k_TKD.transpose(0, 1))
        self._values[layer].index_copy_(1, slots_T, v_TKD.transpose(0, 1))

    def view(self, layer: int, run: Run) -> tuple[Tensor, Tensor]:
        """K and V [L, K, D] of one run, without a copy."""
        slots = slice(run.first_slot, run.first_slot + run.num_tokens)
        return (
            self._keys[layer, :, slots].transpose(0, 1),
            self._values[layer, :, slots].transpose(0, 1),
        )

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V [K, pages, block size, D] of all pages of a layer, without a copy."""
        return self._pages[layer]

    def gather(self, layer: int, runs: tuple[Run, ...]) -> tuple[Tensor, Tensor]:
        """K and V [L, K, D] of runs in order; a view where there is only one."""
        if len(runs) == 1:
            return self.view(layer, runs[0])
        keys, values = zip(*(self.view(layer, run) for run in runs), strict=True)
        return torch.cat(keys), torch.cat(values)

    def flat_pages(self, layer: int, head: int, pages: np.ndarray) -> np.ndarray:
        """Flat pages of a KV head's pages in one layer; int64."""
        return (layer * self._num_kv_heads + head) * self._num_pages + pages

    def staging_pages(self, head: int, blocks: np.ndarray) -> np.ndarray:
        """Flat pages where blocks of a KV head are staged; int64. Every layer uses the same."""
        assert not blocks.size or blocks.max() < self._staging_blocks, "more blocks than staging"
        return self._first_staging + head * self._staging_blocks + blocks
