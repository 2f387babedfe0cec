"""What attention needs of KV storage; csps.engine.kv_pool is the one that serves."""

from typing import Protocol

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

    def gather(self, layer: int, runs: tuple[Run, ...]) -> tuple[Tensor, Tensor]:
        """K and V [L, K, D] of runs in order; a view where there is only one."""
        ...
