"""Fill a Llama, or one tensor-parallel rank's part of it, from a checkpoint.

Tensors are read one by one, straight into their place: memory peaks at the model plus one
tensor. Names are Hugging Face's (csps.model.source).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from csps.checkpoint.locate import Checkpoint
from csps.core.errors import CheckpointError
from csps.core.heads import HeadPart
from csps.core.model_config import ModelConfig
from csps.model.gguf import GgufSource
from csps.model.hf import SafetensorsSource
from csps.model.llama import DecoderLayer, Llama
from csps.model.shard import ModelPart, part_config, whole_model
from csps.model.source import TensorSource

_ALL = slice(None)


class _Piece(NamedTuple):
    """Where a tensor of the checkpoint goes: its rows and columns into `target`, a view."""

    name: str
    shape: tuple[int, ...]
    target: Tensor
    rows: slice = _ALL
    columns: slice = _ALL


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    max_position: int,
    part: ModelPart | None = None,
) -> Llama:
    """The model of `checkpoint`, whose whole configuration is `config`, as `dtype` on `device`.

    With `part` (csps.model.shard) that part alone, of which only the needed slices are read.
    CheckpointError names a tensor that is missing, left over or of the wrong shape.
    """
    part = part or whole_model(config)
    model = Llama(
        part_config(config, part),
        dtype=dtype,
        device=device,
        max_position=max_position,
    )
    source: TensorSource
    if checkpoint.kind == "gguf":
        source = GgufSource(checkpoint.path, config)
    else:
        source = SafetensorsSource(checkpoint.path)
    pieces = list(_pieces(model, config, part))
    _check_names(checkpoint, source, config, pieces)
    for piece in pieces:
        if not piece.target.numel():
            continue  # a part without heads
        file_name = source.file_name(piece.name)
        values = source.read(file_name, piece.rows, piece.columns)
        piece.target.copy_(values.reshape(piece.target.shape))
    return model


def _check_names(
    checkpoint: Checkpoint, source: TensorSource, config: ModelConfig, pieces: list[_Piece]
) -> None:
    """Every tensor that is wanted is there in its shape, and nothing else is."""
    left_over = {name for name in source.shapes if not source.is_ignorable(name)}
    for piece in pieces:
        name = source.file_name(piece.name)
        if name not in source.shapes:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} is missing (expected shape {piece.shape})"
            )
        if source.shapes[name] != piece.shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has shape {source.shapes[name]}, "
                f"expected {piece.shape}"
            )
        left_over.discard(name)
    if config.tie_embeddings:
        left_over.discard(source.file_name("lm_head.weight"))  # a second copy of the embedding
    if left_over:
        name = min(left_over)
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name} of shape {source.shapes[name]} has no place in "
            f"{config.architecture} ({len(left_over)} such tensors)"
        )


def _pieces(model: Llama, config: ModelConfig, part: ModelPart) -> Iterator[_Piece]:
    vocab_size, hidden_size = config.vocab_size, config.hidden_size
    yield _Piece("model.embed_tokens.weight", (vocab_size, hidden_size), model.embedding)
    yield _Piece("model.norm.weight", (hidden_size,), model.norm.weight)
    if not config.tie_embeddings:
        yield _Piece("lm_head.weight", (vocab_size, hidden_size), model.head)
    columns = slice(*part.columns)
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}"
        yield from _attention_pieces(f"{prefix}.self_attn", layer, config, part.heads)
        yield from _mlp_pieces(f"{prefix}.mlp", layer, config, columns)
        norm = layer.attention_norm.weight
        yield _Piece(f"{prefix}.input_layernorm.weight", (hidden_size,), norm)
        norm = layer.mlp_norm.weight
        yield _Piece(f"{prefix}.post_attention_layernorm.weight", (hidden_size,), norm)


def _attention_pieces(
    prefix: str, layer: DecoderLayer, config: ModelConfig, heads: HeadPart
) -> Iterator[_Piece]:
    """The fused qkv rows of these heads, and what surrounds them."""
    attention = layer.attention
    group, head_dim = heads.group_size, config.head_dim
    first = heads.first * config.group_size + heads.group_first
    queries = slice(first * head_dim, (first + heads.num_heads) * head_dim)
    keys = slice(heads.first * head_dim, heads.stop * head_dim)
    parts = (
        ("q_proj", config.num_heads, slice(0, group), queries),
        ("k_proj", config.num_kv_heads, slice(group, group + 1), keys),
        ("v_proj", config.num_kv_heads, slice(group + 1, group + 2), keys),
    )
    weight = attention.qkv.weight.view(heads.num_kv_heads, group + 2, head_dim, config.hidden_size)
    for name, num_heads, within_group, rows in parts:
        shape = (num_heads * head_dim, config.hidden_size)
        yield _Piece(f"{prefix}.{name}.weight", shape, weight[:, within_group], rows)
        if attention.qkv.bias is not None:
            bias = attention.qkv.bias.view(heads.num_kv_heads, group + 2, head_dim)
            yield _Piece(f"{prefix}.{name}.bias", shape[:1], bias[:, within_group], rows)
    shape = (config.hidden_size, config.num_heads * head_dim)
    output = attention.output
    yield _Piece(f"{prefix}.o_proj.weight", shape, output.weight, columns=queries)
    if output.bias is not None:
        yield _Piece(f"{prefix}.o_proj.bias", shape[:1], output.bias)
    if attention.q_norm is not None and attention.k_norm is not None:
        yield _Piece(f"{prefix}.q_norm.weight", (head_dim,), attention.q_norm.weight)
        yield _Piece(f"{prefix}.k_norm.weight", (head_dim,), attention.k_norm.weight)


def _mlp_pieces(
    prefix: str, layer: DecoderLayer, config: ModelConfig, part: slice
) -> Iterator[_Piece]:
    """Rows of gate and up and columns of down for the range `part`."""
    shape = (config.intermediate_size, config.hidden_size)
    for name, linear in (("gate_proj", layer.mlp.gate), ("up_proj", layer.mlp.up)):
        yield _Piece(f"{prefix}.{name}.weight", shape, linear.weight, part)
        if linear.bias is not None:
            yield _Piece(f"{prefix}.{name}.bias", shape[:1], linear.bias, part)
    down = layer.mlp.down
    yield _Piece(f"{prefix}.down_proj.weight", shape[::-1], down.weight, columns=part)
    if down.bias is not None:
        yield _Piece(f"{prefix}.down_proj.bias", shape[1:], down.bias)
