"""GGUF metadata -> ModelConfig. Keys: ggml's docs/gguf.md and llama.cpp's `LLM_KV_*`."""

import math
import struct
from pathlib import Path

from csps.checkpoint.gguf_metadata import GgufHeader, GgufTensor, read_header
from csps.checkpoint.values import Values
from csps.core.errors import CheckpointError
from csps.core.model_config import ModelConfig, RopeConfig, RopeScaling

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_F32 = 0
ROPE_FACTORS = "rope_freqs.weight"


def read_gguf_config(path: Path) -> ModelConfig:
    """ModelConfig of the GGUF file at `path`.

    CheckpointError names the key or tensor that is missing or not supported.
    """
    header = read_header(path)
    values = Values(str(path), header.metadata)
    prefix = values.text("general.architecture")
    if prefix not in _ARCHITECTURES:
        raise values.unsupported("general.architecture", ", ".join(_ARCHITECTURES))
    if values.integer(f"{prefix}.expert_count", 0):
        raise values.unsupported(f"{prefix}.expert_count", "dense models")
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise CheckpointError(f"{path}: no matrix token_embd.weight")
    num_heads = values.positive(f"{prefix}.attention.head_count")
    num_kv_heads = values.positive(f"{prefix}.attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise values.wrong(f"{prefix}.attention.head_count_kv", f"a divisor of {num_heads}")
    hidden_size = values.positive(f"{prefix}.embedding_length")
    head_dim = _head_dim(values, prefix, hidden_size // num_heads)
    context = values.positive(f"{prefix}.context_length")
    window = values.integer(f"{prefix}.attention.sliding_window", 0) or context
    return ModelConfig(
        architecture=_ARCHITECTURES[prefix],
        vocab_size=shapes["token_embd.weight"][0],
        hidden_size=hidden_size,
        intermediate_size=values.positive(f"{prefix}.feed_forward_length"),
        num_layers=values.positive(f"{prefix}.block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=values.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
        max_position=min(context, window),
        rope=_rope(path, header, values, head_dim=head_dim, context=context),
        qkv_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
        tie_embeddings="output.weight" not in shapes,
        bos_token_id=next(iter(values.token_ids("tokenizer.ggml.bos_token_id")), None),
        eos_token_ids=_eos_token_ids(values),
    )


def _head_dim(values: Values, prefix: str, default: int) -> int:
    """Head dimension of q, k and v, all of it rotated."""
    head_dim = values.positive(f"{prefix}.attention.key_length", default)
    for key in (f"{prefix}.attention.value_length", f"{prefix}.rope.dimension_count"):
        if values.positive(key, head_dim) != head_dim:
            raise values.unsupported(key, f"{head_dim}, the head dimension")
    if head_dim % 2:
        raise CheckpointError(f"{values.source}: head dimension {head_dim} is odd")
    return head_dim


def _eos_token_ids(values: Values) -> tuple[int, ...]:
    ids: dict[int, None] = {}
    for name in ("eos", "eot", "eom"):
        ids.update(dict.fromkeys(values.token_ids(f"tokenizer.ggml.{name}_token_id")))
    return tuple(ids)


def _rope(
    path: Path, header: GgufHeader, values: Values, *, head_dim: int, context: int
) -> RopeConfig:
    prefix = values.text("general.architecture")
    theta = values.number(f"{prefix}.rope.freq_base", 10_000.0)
    scaling = f"{prefix}.rope.scaling"
    kind = values.text(f"{scaling}.type", "none")
    factor = values.number(f"{scaling}.factor", 1.0)
    factors = next((tensor for tensor in header.tensors if tensor.name == ROPE_FACTORS), None)
    if factors is not None and kind != "none":
        raise values.unsupported(f"{scaling}.type", f"none, beside {ROPE_FACTORS}")
    if factors is not None:
        return llama3_from_factors(theta, head_dim, _read_factors(path, factors, head_dim))
    if kind == "none":
        # llama.cpp's own early files say it with this key alone.
        linear = values.number(f"{prefix}.rope.scale_linear", 1.0)
        kind, factor = ("linear", linear) if linear != 1.0 else (kind, factor)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta, RopeScaling.LINEAR, factor, context)
    if kind != "yarn":
        raise values.unsupported(f"{scaling}.type", "none, linear, yarn")
    if values.number(f"{scaling}.yarn_log_multiplier", 0.0):
        raise values.unsupported(f"{scaling}.yarn_log_multiplier", "0")
    if values.number(f"{scaling}.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise values.unsupported(f"{scaling}.yarn_ext_factor", "1")
    attention = values.number(
        f"{scaling}.yarn_attn_factor", values.number(f"{scaling}.attn_factor", 1.0)
    )
    return RopeConfig(
        theta=theta,
        scaling=RopeScaling.YARN,
        factor=factor,
        original_max_position=values.positive(f"{scaling}.original_context_length", context),
        beta_fast=values.number(f"{scaling}.yarn_beta_fast", 32.0),
        beta_slow=values.number(f"{scaling}.yarn_beta_slow", 1.0),
        attention_factor=attention * (0.1 * math.log(max(factor, 1.0)) + 1.0),
    )


def _read_factors(path: Path, tensor: GgufTensor, head_dim: int) -> tuple[float, ...]:
    count = head_dim // 2
    if tensor.shape != (count,) or tensor.type_id != _F32:
        raise CheckpointError(
            f"{path}: {tensor.name} has shape {tensor.shape} and type {tensor.type_id}, "
            f"expected {(count,)} and F32"
        )
    with path.open("rb") as file:
        file.seek(tensor.offset)
        data = file.read(4 * count)
    if len(data) != 4 * count:
        raise CheckpointError(f"{path}: cut short within {tensor.name}")
    return struct.unpack(f"<{count}f", data)


def llama3_from_factors(theta: float, head_dim: int, factors: tuple[float, ...]) -> RopeConfig:
    """The llama3 scaling that gives `factors`, the divisors of the inverse frequencies.

    llama3 divides a frequency of w rotations per token by 1 / ((1 - s) / F + s), with
    s = clamp((w L - low) / (high - low), 0, 1) (Llama 3.1; transformers' modeling_rope_utils).
    So F is the largest divisor, and L, low and high follow, up to a common scale, from the
    straight line s(w) through the frequencies strictly between the bounds. The result is
    checked against every factor; CheckpointError if they are of another kind of scaling.
    """
    largest = max(factors)
    if largest == min(factors) == 1.0:
        return RopeConfig(theta=theta)
    unknown = CheckpointError(f"{ROPE_FACTORS} holds no llama3 scaling: {factors}")
    if min(factors) < 1.0:
        raise unknown
    rotations = [theta ** (-2 * i / head_dim) / (2 * math.pi) for i in range(len(factors))]
    points = [
        (w, (1 / f - 1 / largest) / (1 - 1 / largest))
        for w, f in zip(rotations, factors, strict=True)
        if 1.0 < f < largest
    ]
    if len(points) < 2:
        raise unknown
    (w0, s0), (w1, s1) = points[0], points[-1]
    slope = (s0 - s1) / (w0 - w1)
    low = slope * w0 - s0  # the line is s = slope * w - low, for high = low + 1
    if slope <= 0 or low <= 0:
        raise unknown
    for w, f in zip(rotations, factors, strict=True):
        s = min(max(slope * w - low, 0.0), 1.0)
        if not math.isclose(1 / ((1 - s) / largest + s), f, rel_tol=1e-4):
            raise unknown
    # The scale in which the original context is a whole number and low is 1, as published.
    original = max(round(slope / low), 1)
    scale = original / slope
    return RopeConfig(
        theta=theta,
        scaling=RopeScaling.LLAMA3,
        factor=largest,
        original_max_position=original,
        low_freq_factor=low * scale,
        high_freq_factor=(low + 1) * scale,
    )
