"""Hugging Face config.json and generation_config.json -> ModelConfig.

Keys, defaults and precedence follow transformers (5.x, which also reads what 4.x wrote).
"""

import json
from pathlib import Path
from typing import NamedTuple

from csps.checkpoint.values import Values
from csps.core.errors import CheckpointError
from csps.core.model_config import ModelConfig, RopeConfig, RopeScaling


class _Family(NamedTuple):
    """What an architecture fixes in code rather than in config.json."""

    qkv_bias: bool | None  # None: the key attention_bias says
    output_bias: bool | None
    qk_norm: bool = False
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads


_FAMILIES = {
    "LlamaForCausalLM": _Family(qkv_bias=None, output_bias=None),
    "MistralForCausalLM": _Family(qkv_bias=False, output_bias=False),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, output_bias=False),
    "Qwen3ForCausalLM": _Family(None, None, qk_norm=True, default_head_dim=128),
}
_ROPE_KINDS = {
    "default": RopeScaling.NONE,
    "linear": RopeScaling.LINEAR,
    "dynamic": RopeScaling.DYNAMIC,
    "yarn": RopeScaling.YARN,
    "llama3": RopeScaling.LLAMA3,
}


def read_hf_config(directory: Path) -> ModelConfig:
    """ModelConfig of the checkpoint in `directory`.

    If layers attend within a sliding window, dense attention is exact up to the window's
    length, so that is the context length given. CheckpointError names the key at fault.
    """
    values = _read_json(directory / "config.json")
    architecture = _architecture(values)
    family = _FAMILIES[architecture]
    _reject_unsupported(values)
    attention_bias = values.flag("attention_bias", False)
    num_heads = values.positive("num_attention_heads")
    num_kv_heads = values.positive("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise values.wrong("num_key_value_heads", f"a divisor of num_attention_heads {num_heads}")
    hidden_size = values.positive("hidden_size")
    head_dim = values.positive("head_dim", family.default_head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise values.wrong("head_dim", "even, for rotary embeddings")
    bos_token_id, eos_token_ids = _special_tokens(directory, values)
    rope, max_position = _rope(values)
    return ModelConfig(
        architecture=architecture,
        vocab_size=values.positive("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=values.positive("intermediate_size"),
        num_layers=values.positive("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=values.number("rms_norm_eps", 1e-6),
        max_position=min(max_position, _window(values, architecture) or max_position),
        rope=rope,
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=architecture == "LlamaForCausalLM" and values.flag("mlp_bias", False),
        qk_norm=family.qk_norm,
        tie_embeddings=values.flag("tie_word_embeddings", False),
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
    )


def _read_json(path: Path) -> Values:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return Values(str(path), parsed)


def _architecture(values: Values) -> str:
    names = values.items("architectures")
    for name in names:
        if isinstance(name, str) and name in _FAMILIES:
            return name
    raise CheckpointError(
        f"{values.source}: architectures {names} not supported (supported: {', '.join(_FAMILIES)})"
    )


def _reject_unsupported(values: Values) -> None:
    if values.text("hidden_act", "silu") not in ("silu", "swish"):
        raise values.unsupported("hidden_act", "silu")
    if "quantization_config" in values:
        raise values.unsupported("quantization_config", "unquantised weights, or a GGUF file")


def _special_tokens(directory: Path, values: Values) -> tuple[int | None, tuple[int, ...]]:
    """(bos, every id that ends a generation): generation_config.json's before config.json's."""
    path = directory / "generation_config.json"
    sources = [_read_json(path), values] if path.is_file() else [values]
    eos: dict[int, None] = {}
    bos: int | None = None
    for source in sources:
        eos.update(dict.fromkeys(source.token_ids("eos_token_id")))
        if bos is None and "bos_token_id" in source:
            bos = source.integer("bos_token_id")
    return bos, tuple(eos)


def _window(values: Values, architecture: str) -> int | None:
    """Length of the sliding window, if any layer has one."""
    if architecture == "LlamaForCausalLM" or "sliding_window" not in values:
        return None
    if architecture != "MistralForCausalLM":
        if not values.flag("use_sliding_window", False):
            return None
        layer_types = values.items("layer_types")
        first = values.integer("max_window_layers", 28)
        slides = (
            "sliding_attention" in layer_types
            if layer_types
            else first < values.positive("num_hidden_layers")
        )
        if not slides:
            return None
    return values.positive("sliding_window")


def _rope_section(values: Values) -> tuple[Values, RopeScaling]:
    """(the mapping that says how positions are rotated, its kind)."""
    # transformers: an old `rope_scaling`, where there is one, wins over `rope_parameters`.
    rope = values.section("rope_scaling" if values.get("rope_scaling") else "rope_parameters")
    if rope.nested():
        raise CheckpointError(f"{rope.source}: rotary embeddings per layer type are not supported")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in _ROPE_KINDS:
        raise CheckpointError(
            f"{rope.source}: rope_type {kind!r} is not supported "
            f"(supported: {', '.join(_ROPE_KINDS)})"
        )
    for source in (values, rope):
        if source.number("partial_rotary_factor", 1.0) != 1.0:
            raise source.unsupported("partial_rotary_factor", "1.0")
    return rope, _ROPE_KINDS[kind]


def _rope(values: Values) -> tuple[RopeConfig, int]:
    """(rotary embedding, context length in tokens).

    YaRN with its original context given serves factor times that, even where
    max_position_embeddings was left at the original (as Qwen2.5 tells its users to).
    """
    rope, scaling = _rope_section(values)
    context = values.positive("max_position_embeddings")
    theta = rope.number("rope_theta", values.number("rope_theta", 10_000.0))
    if scaling is RopeScaling.NONE:
        return RopeConfig(theta=theta), context
    original, given = context, False
    if scaling in (RopeScaling.YARN, RopeScaling.LLAMA3):
        key = "original_max_position_embeddings"
        given = key in values or key in rope
        original = values.positive(key, rope.positive(key, context))
    if scaling is RopeScaling.YARN:
        factor = rope.number("factor", context / original)
        if given:
            context = max(context, int(factor * original))
    else:
        factor = rope.number("factor")
    llama3 = scaling is RopeScaling.LLAMA3
    config = RopeConfig(
        theta=theta,
        scaling=scaling,
        factor=factor,
        original_max_position=original,
        low_freq_factor=rope.number("low_freq_factor", None if llama3 else 1.0),
        high_freq_factor=rope.number("high_freq_factor", None if llama3 else 4.0),
        # transformers reads 0 as absent here.
        beta_fast=rope.number("beta_fast", 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0) or 1.0,
        attention_factor=rope.number_or_none("attention_factor"),
        mscale=rope.number_or_none("mscale"),
        mscale_all_dim=rope.number_or_none("mscale_all_dim"),
        truncate=rope.flag("truncate", True),
    )
    return config, context
