"""Tensor parallelism, applied to a model from outside (Megatron-LM, arXiv 1909.08053, 3).

Rank r of tp keeps a range of KV heads with the query heads that use them, and a range of the
intermediate dimension: qkv, gate and up lose rows (outputs), output and down lose columns
(inputs), and the sum over the ranks restores what those two give. Embedding, head and norms
are on every rank.
"""

import copy
import dataclasses
from collections.abc import Callable

from torch import Tensor, nn

from csps.core.errors import ConfigError
from csps.core.model_config import ModelConfig
from csps.model.layers import Linear, linear
from csps.model.llama import Llama


def kv_head_range(config: ModelConfig, tp_rank: int, tp_size: int) -> tuple[int, int]:
    """KV heads [first, stop) of this rank; ranges differ by at most one head."""
    return _part(config.num_kv_heads, tp_rank, tp_size)


def intermediate_range(config: ModelConfig, tp_rank: int, tp_size: int) -> tuple[int, int]:
    """Columns [first, stop) of the intermediate dimension of this rank."""
    return _part(config.intermediate_size, tp_rank, tp_size)


def _part(size: int, rank: int, num_ranks: int) -> tuple[int, int]:
    return rank * size // num_ranks, (rank + 1) * size // num_ranks


def shard_config(config: ModelConfig, tp_rank: int, tp_size: int) -> ModelConfig:
    """The configuration of one rank's part. ConfigError if there are fewer KV heads than ranks."""
    if tp_size > config.num_kv_heads:
        raise ConfigError(
            f"--tp {tp_size}: the model has {config.num_kv_heads} KV heads, "
            f"so --tp can be at most {config.num_kv_heads}"
        )
    assert 0 <= tp_rank < tp_size, (tp_rank, tp_size)
    first, stop = kv_head_range(config, tp_rank, tp_size)
    first_column, stop_column = intermediate_range(config, tp_rank, tp_size)
    return dataclasses.replace(
        config,
        num_heads=(stop - first) * config.group_size,
        num_kv_heads=stop - first,
        intermediate_size=stop_column - first_column,
    )


class _SummedLinear(nn.Module):
    """A Linear whose input columns are spread over ranks: partial products, summed."""

    def __init__(self, part: Linear, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.part = part
        self._reduce = reduce

    def forward(self, x_TI: Tensor) -> Tensor:
        part = self.part
        y = linear(x_TI, part.weight, None, upcast=part.upcast, out_dtype=x_TI.dtype)
        y = self._reduce(y)
        # After the sum, or it would be added once per rank.
        return y if part.bias is None else y.add_(part.bias)


def tensor_parallel(model: Llama, reduce: Callable[[Tensor], Tensor]) -> Llama:
    """A model that runs `model`'s part of the weights together with the other ranks.

    `model` is a rank's part as csps.model.loader gives it, and stays as it is: the new module
    tree shares its storage, so that one can be made per lane, each with its own `reduce`.
    `reduce` sums a contiguous [T, E] over the ranks, in place or not, and returns the sum; it
    is called twice per layer, in the same order on every rank.
    """
    shared: dict[int, object] = {id(tensor): tensor for tensor in model.parameters()}
    shared.update((id(tensor), tensor) for tensor in model.buffers())
    # deepcopy takes what the memo holds instead of copying it.
    lane = copy.deepcopy(model, shared)
    for layer in lane.layers:
        layer.attention.output = _SummedLinear(layer.attention.output, reduce)
        layer.mlp.down = _SummedLinear(layer.mlp.down, reduce)
    return lane
