"""What FlashInfer asks for, made from what attention has; without FlashInfer.

Limits are those of its kernels, read in the source of 0.6.13. Suffix: R rows that have keys.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csps.attention.backends.decode_memory import DecodeBytes, DecodeShape, DecodeSteps
from csps.attention.shards import Run, page_lists

# Of both its prefill kernels and its decode kernels.
HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
# Decode without tensor cores: a thread has the dot products of all heads of a group.
MAX_GROUP_WITHOUT_TENSOR_CORES = 3
# Rows of a program in the kernel for Hopper, which never splits keys.
HOPPER_ROWS = 128
# What a decode wrapper makes for its plan beside the workspace it is given; as much on the host.
PLAN_BYTES = 8 << 20


class PageTable(NamedTuple):
    """Pages of the rows that have keys, on the host, int32 but for `rows`, which is int64.

    Row rows[i] has pages indices[indptr[i] : indptr[i + 1]], and last_page_len[i] keys in the
    last of them.
    """

    rows: Tensor  # [R]
    indptr: Tensor  # [R + 1]
    indices: Tensor
    last_page_len: Tensor  # [R]


def page_table(shards: Sequence[tuple[Run, ...]], page_size: int) -> PageTable:
    """Rows without keys are left out: FlashInfer's log-sum-exp of nothing is finite (-5e4)."""
    starts, pages, lengths = page_lists(shards, page_size)
    rows_R = np.flatnonzero(lengths)
    last_R = (lengths[rows_R] - 1) % page_size + 1
    int32 = (np.append(starts[rows_R], len(pages)), pages, last_R)
    return PageTable(
        torch.from_numpy(rows_R), *(torch.from_numpy(x.astype(np.int32)) for x in int32)
    )


def natural_log(lse: Tensor, out: Tensor) -> None:
    """Fill `out` with log-sum-exps by the natural logarithm; FlashInfer's are to base 2."""
    torch.mul(lse, math.log(2), out=out)


def uses_tensor_cores(group_size: int) -> bool:
    """Whether decode should: else it has arithmetic enough to be slower than memory."""
    return group_size > MAX_GROUP_WITHOUT_TENSOR_CORES


def workspace_bytes(
    group_size: int, head_dim: int, num_processors: int, *, rows_in_graph: int = 0
) -> int:
    """Of the partial outputs and log-sum-exps of one step's rows, where keys are split.

    With tensor cores at most 2 programs a processor have tiles of 16, 64 or 128 rows, without
    them at most 32 have one row each; both times fp32, for all heads of a group. In a CUDA graph
    there are 2 tiles at least for each of `rows_in_graph`: rows times KV heads.
    """
    tile = next(rows for rows in (16, 64, 128) if group_size <= rows or rows == 128)
    rows = 2 * max(num_processors, rows_in_graph) * tile * group_size
    return 4 * rows * (head_dim + 1) + (1 << 20)


def decode_bytes(shape: DecodeShape, steps: DecodeSteps) -> DecodeBytes:
    """See `SizedDecode`: wrappers, and the tables that they are planned with.

    Plain steps have no more wrappers than one step has calls: a step ends when the GPU is done
    with it, so the next one finds them idle. The first is there from when the kernels were tried.
    """
    indices = 4 * steps.num_rows * steps.pages_per_row
    # The last step's tables lie beside the next one's while it is planned; rows with keys, int64.
    tables = 2 * (_row_table_bytes(steps.num_rows) + indices) + 8 * steps.num_rows
    fixed = steps.num_calls * (_wrapper_bytes(shape) + tables)
    for num_rows in steps.fixed_rows:
        fixed += _wrapper_bytes(shape, rows_in_graph=num_rows * shape.num_kv_heads)
        fixed += _row_table_bytes(num_rows) + num_rows  # and which rows are empty
    # Pages of one step at a time, on their way into their table; an empty row has one.
    fixed += 4 * max(steps.fixed_rows, default=0) * max(steps.pages_per_row, 1)
    return DecodeBytes(fixed, per_page=4 * sum(steps.fixed_rows))


def _wrapper_bytes(shape: DecodeShape, *, rows_in_graph: int = 0) -> int:
    workspace = workspace_bytes(
        shape.group_size, shape.head_dim, shape.num_processors, rows_in_graph=rows_in_graph
    )
    return workspace + PLAN_BYTES


def _row_table_bytes(num_rows: int) -> int:
    """Where the rows' pages and queries begin, and keys in the last pages; int32."""
    return 4 * (2 * (num_rows + 1) + num_rows)


def splits_keys(num_rows: int, num_heads: int, num_processors: int) -> bool:
    """Whether rows over contiguous keys are too few to keep a GPU busy without that."""
    return -(-num_rows // HOPPER_ROWS) * num_heads < num_processors
