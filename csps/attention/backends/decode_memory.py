"""What decode's kernels take on the device beside activations: tables and buffers of their own."""

from typing import NamedTuple, Protocol, runtime_checkable


class DecodeShape(NamedTuple):
    """KV heads of a rank's store, query heads of each, and multiprocessors of its device."""

    num_kv_heads: int
    group_size: int
    head_dim: int
    num_processors: int

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group_size


class DecodeSteps(NamedTuple):
    """The largest decode steps of a rank.

    `num_rows`: of a step, which prepares them in up to `num_calls` calls of its `PagedDecode`, all
    of them alive at a time. `pages_per_row`: at most. `fixed_rows`: rows of each `FixedRows` there
    is, which may have any number of the store's pages each; none without CUDA graphs.
    """

    num_rows: int
    num_calls: int
    pages_per_row: int
    fixed_rows: tuple[int, ...] = ()


class DecodeBytes(NamedTuple):
    """On the device: `fixed`, and `per_page` for each page of the store."""

    fixed: int
    per_page: int


@runtime_checkable
class SizedDecode(Protocol):
    """What a `PagedDecode` is besides if it takes more than activations."""

    def device_bytes(self, shape: DecodeShape, steps: DecodeSteps) -> DecodeBytes:
        """At most, as asked of the allocator, whose own rounding is not counted."""
        ...
