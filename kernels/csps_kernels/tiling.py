"""How attention of many rows is cut into programs."""

from typing import NamedTuple

import torch
import triton


class Tiling(NamedTuple):
    """Rows of a program and keys of a step of its loop, on how many warps, in how many buffers."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def choose_tiling(num_rows: int, max_keys: int, dtype: torch.dtype) -> Tiling:
    """For `num_rows` rows that see the same keys; steps of `max_keys` (a power of 2) at most.

    On 4 warps, an output of 128 rows and 128 dims does not fit the registers.
    """
    if dtype == torch.float32:
        return Tiling(min(_padded(num_rows), 64), min(max_keys, 32), 4, 2)
    rows = min(_padded(num_rows), 128)
    # 192 rows are three tiles of 64 rather than two of 128.
    if rows == 128 and triton.cdiv(num_rows, 128) * 128 > num_rows * 5 // 4:
        rows = 64
    return Tiling(rows, min(max_keys, 64), 8 if rows == 128 else 4, 3)


def check_sizes(**sizes: int) -> None:
    """ValueError unless every size is a power of 2, 16 or more, as tensor cores want them."""
    for name, size in sizes.items():
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name.replace('_', ' ')} {size} is not a power of 2, 16 or more")


def _padded(num_rows: int) -> int:
    """Rows of a tile that holds them all: a power of 2, 16 or more."""
    return max(triton.next_power_of_2(num_rows), 16)
