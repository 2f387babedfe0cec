"""What attention needs of KV storage; csps.engine.kv_pool is the one that serves."""

from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from csps.attention.shards import Run


class KVStore(Protocol):
    """K and V of this rank's tokens. Suffixes: L tokens, K KV heads, D head dim."""

    def write(self, layer: int, slots_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Store new tokens' K and V at their slots."""
        ...

    def view(self, layer: int, run: Run) -> tuple[Tensor, Tensor]:
        """K and V [L, K, D] of one run, without a copy."""
        ...

    flat_keys: Tensor
    """[flat pages, block size, D], keys of all layers and KV heads, then the staging."""
    flat_values: Tensor
    """As `flat_keys`."""

    def flat_pages(self, layer: int, head: int, pages: np.ndarray) -> np.ndarray:
        """Flat pages of a KV head's pages in one layer; int64."""
        ...

    def staging_pages(self, head: int, blocks: np.ndarray) -> np.ndarray:
        """Flat pages where the given blocks of a KV head are staged; int64."""
        ...

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V [K, pages, block size, D] of all pages of a layer, without a copy."""
        ...

    def gather(self, layer: int, runs: tuple[Run, ...]) -> tuple[Tensor, Tensor]:
        """K and V [L, K, D] of runs in order; a view where there is only one."""
        ...


class KVSlots(NamedTuple):
    """Where new tokens' K and V go: `slots_T`, int64, one for each token, of `store`."""

    store: KVStore
    slots_T: Tensor
