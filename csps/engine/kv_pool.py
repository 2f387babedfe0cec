"""This rank's KV: `num_pages` pages of `block_size` tokens, in all layers.

Who owns which page is the coordinator's ledger's business; here a page is only a place.
Slot = page * block_size + offset. Pages of a shard that follow each other are one run of
slots, so attention reads them in place.
"""

import torch
from torch import Tensor

from csps.attention.shards import Run


class KVPool:
    """Storage of K and V, each [layers, KV heads, pages * block_size, head dim].

    Head-major: attention walks the keys of one head at a time, and on a CPU reads them a third
    faster when they lie together. Memory is touched when it is first written, so an idle pool
    costs little.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_kv_heads, num_pages * block_size, head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)

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

    def gather(self, layer: int, runs: tuple[Run, ...]) -> tuple[Tensor, Tensor]:
        """K and V [L, K, D] of runs in order; a view where there is only one."""
        if len(runs) == 1:
            return self.view(layer, runs[0])
        keys, values = zip(*(self.view(layer, run) for run in runs), strict=True)
        return torch.cat(keys), torch.cat(values)
