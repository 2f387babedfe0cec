"""Tensor parallelism, applied to a model from outside (Megatron-LM, arXiv 1909.08053, 3).

A rank keeps a part of the heads and a range of the intermediate dimension: qkv, gate and up
lose rows (outputs), output and down lose columns (inputs), and the sum over the ranks restores
what those two give. Norms and embedding are on every rank; the head gives each rank the logits
of a range of the vocabulary.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from csps.core.heads import HeadPart, all_heads
from csps.core.model_config import ModelConfig
from csps.model.layers import Linear
from csps.model.llama import Attention, Llama, SwiGLU

# Fewer rows than this are not worth a message of their own.
MIN_PIECE_ROWS = 128


class Summing(Protocol):
    """A sum under way: the tensor must not be touched before `wait` returns."""

    def wait(self) -> None: ...


Reduce = Callable[[Tensor], Summing]


class ModelPart(NamedTuple):
    """What one rank has of the linear layers: heads, and columns of the intermediate dimension."""

    heads: HeadPart
    columns: tuple[int, int]

    def split(self, num_parts: int) -> list["ModelPart"]:
        """Cut into parts of nearly equal size, in order; some may have no heads."""
        first, stop = self.columns
        bounds = [first + part * (stop - first) // num_parts for part in range(num_parts + 1)]
        heads = self.heads.split(num_parts)
        return [
            ModelPart(heads[part], (bounds[part], bounds[part + 1])) for part in range(num_parts)
        ]


def whole_model(config: ModelConfig) -> ModelPart:
    """All of it."""
    return ModelPart(
        all_heads(config.num_heads, config.num_kv_heads), (0, config.intermediate_size)
    )


def part_config(config: ModelConfig, part: ModelPart) -> ModelConfig:
    """The configuration of one part of the model that `config` describes."""
    return dataclasses.replace(
        config,
        num_heads=part.heads.num_heads,
        num_kv_heads=part.heads.num_kv_heads,
        intermediate_size=part.columns[1] - part.columns[0],
    )


def vocabulary_range(vocab_size: int, rank: int, size: int) -> tuple[int, int]:
    """Tokens [first, stop) whose logits a rank computes: equally many but on the last ranks."""
    width = -(-vocab_size // size)
    return min(rank * width, vocab_size), min((rank + 1) * width, vocab_size)


def tensor_parallel(
    model: Llama,
    resident: ModelPart,
    part: ModelPart,
    *,
    rank: int,
    size: int,
    reduce: Reduce,
    num_pieces: int = 1,
) -> Llama:
    """A model that runs `part` of `model`'s weights together with the other ranks.

    `model` holds the weights of `resident`, which `part` lies in, and stays as it is: the new
    module tree has views of its storage, so that there can be one per lane and layout. `reduce`
    starts to sum a contiguous [T, E] over the ranks, in place; calls come in the same order on
    every rank. In steps of many tokens each sub-layer sums `num_pieces` pieces, each while the next
    is computed. `logits` gives the vocabulary_range of `rank` of `size`.
    """
    shared: dict[int, object] = {id(tensor): tensor for tensor in model.parameters()}
    shared.update((id(tensor), tensor) for tensor in model.buffers())
    # deepcopy takes what the memo holds instead of copying it.
    view = copy.deepcopy(model, shared)
    view.config = part_config(model.config, part)
    for layer in view.layers:
        _view_attention(layer.attention, resident.heads, part.heads)
        _view_mlp(layer.mlp, resident.columns[0], part.columns)
        output, mlp = layer.attention.output, layer.mlp
        layer.attention.output = _Summed(output, _take_bias(output), reduce, num_pieces)
        layer.mlp = _Summed(mlp, _take_bias(mlp.down), reduce, num_pieces)
    rows = slice(*vocabulary_range(model.config.vocab_size, rank, size))
    view.head = nn.Parameter(model.head[rows], requires_grad=False)
    return view


def _view_attention(attention: Attention, resident: HeadPart, part: HeadPart) -> None:
    """Rows of qkv are KV-head-major: a head's queries, its key, its value (see Attention)."""
    dim, group = attention.head_dim, resident.group_size
    first = (part.first - resident.first) * (group + 2)
    stop = first + part.num_kv_heads * (group + 2)
    if part.num_kv_heads and part.group_stop < resident.group_stop:
        # Its queries are not the last of the group, so key and value do not follow them.
        queries = first + part.group_first - resident.group_first
        ranges = [(queries, queries + part.group_size), (stop - 2, stop)]
    else:
        ranges = [(first + part.group_first - resident.group_first, stop)]
    parts = [attention.qkv.outputs(start * dim, end * dim) for start, end in ranges]
    attention.qkv = parts[0] if len(parts) == 1 else _SideBySide(parts)
    queries = (part.first - resident.first) * group + part.group_first - resident.group_first
    attention.output = attention.output.inputs(queries * dim, (queries + part.num_heads) * dim)
    attention.num_kv_heads, attention.group_size = part.num_kv_heads, part.group_size


def _view_mlp(mlp: SwiGLU, first: int, columns: tuple[int, int]) -> None:
    start, stop = columns[0] - first, columns[1] - first
    mlp.gate, mlp.up = mlp.gate.outputs(start, stop), mlp.up.outputs(start, stop)
    mlp.down = mlp.down.inputs(start, stop)


def _take_bias(linear: Linear) -> Tensor | None:
    """Remove the bias: it is added after the sum, or it would be added once per rank."""
    bias, linear.bias = linear.bias, None
    return bias


class _SideBySide(nn.Module):
    """Outputs of several linear layers of one input, in one tensor."""

    def __init__(self, parts: list[Linear]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x_TI: Tensor) -> Tensor:
        return torch.cat([part(x_TI) for part in self.parts], dim=1)


class _Summed(nn.Module):
    """A sub-layer whose output each rank has a term of: the terms, summed, and the bias.

    Rows are independent, so that one piece of them is summed while the next is computed.
    """

    def __init__(
        self, term: nn.Module, bias: Tensor | None, reduce: Reduce, num_pieces: int
    ) -> None:
        super().__init__()
        self.term = term
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._reduce = reduce
        self._num_pieces = num_pieces

    def forward(self, x_TI: Tensor) -> Tensor:
        num_pieces = self._num_pieces if len(x_TI) >= MIN_PIECE_ROWS * self._num_pieces else 1
        sums, under_way = [], []
        for piece in x_TI.split(-(-len(x_TI) // num_pieces)):
            sums.append(self.term(piece))
            under_way.append(self._reduce(sums[-1]))
        for handle in under_way:
            handle.wait()
        y = sums[0] if len(sums) == 1 else torch.cat(sums)
        return y if self.bias is None else y.add_(self.bias)
