"""Where the tokens of one sequence are, on all ranks, as its plans have told.

Pure arithmetic on extents: no tensors, so it can be tested alone.
"""

from collections.abc import Iterable

import numpy as np

from csps.attention.shards import Run
from csps.core.shards import Extent


class BlockTable:
    """Blocks of one sequence, in block order, with the rank and page of each."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._extents: list[tuple[int, Extent]] = []  # (first position, extent)
        self._capacity = 0

    def extend(self, extents: Iterable[Extent]) -> None:
        """Add blocks behind the last."""
        for extent in extents:
            self._extents.append((self._capacity, extent))
            self._capacity += extent.num_pages * self.block_size

    def shard_tokens(self, num_tokens: int, num_ranks: int) -> tuple[int, ...]:
        """How many of the first `num_tokens` tokens each rank holds (index = rank)."""
        assert num_tokens <= self._capacity, (num_tokens, self._capacity)
        totals = [0] * num_ranks
        for first, extent in self._extents:
            if first >= num_tokens:
                break
            totals[extent.rank] += min(extent.num_pages * self.block_size, num_tokens - first)
        return tuple(totals)

    def runs(self, rank: int, num_tokens: int) -> tuple[Run, ...]:
        """The shard of `rank` among the first `num_tokens` tokens, neighbours joined."""
        runs: list[Run] = []
        for first, extent in self._extents:
            if first >= num_tokens:
                break
            if extent.rank != rank:
                continue
            length = min(extent.num_pages * self.block_size, num_tokens - first)
            slot = extent.first_page * self.block_size
            if runs and runs[-1].first_slot + runs[-1].num_tokens == slot:
                runs[-1] = Run(runs[-1].first_slot, runs[-1].num_tokens + length)
            else:
                runs.append(Run(slot, length))
        return tuple(runs)

    def blocks(self, rank: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the blocks of `rank` among the first `num_blocks`, and their pages; int64."""
        blocks, pages = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for first, extent in self._extents:
            index = first // self.block_size
            if extent.rank == rank and index < num_blocks:
                count = min(extent.num_pages, num_blocks - index)
                blocks.append(np.arange(index, index + count))
                pages.append(np.arange(extent.first_page, extent.first_page + count))
        return np.concatenate(blocks), np.concatenate(pages)

    def slots(self, start: int, stop: int) -> list[int]:
        """Pool slots of positions [start, stop), which lie on one rank."""
        slots: list[int] = []
        for first, extent in self._extents:
            end = first + extent.num_pages * self.block_size
            low, high = max(start, first), min(stop, end)
            if low < high:
                base = extent.first_page * self.block_size - first
                slots.extend(range(base + low, base + high))
        assert len(slots) == stop - start, f"positions [{start}, {stop}) have no block"
        return slots
