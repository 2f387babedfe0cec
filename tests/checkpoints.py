"""Tiny random checkpoints of every supported family, written by transformers and by gguf."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

# 3 KV heads split unevenly over 2 ranks; no size but the head dimension is a power of two.
_SHAPE = {
    "vocab_size": 160,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
_OVERRIDES = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 32},  # not hidden_size / num_attention_heads
}


def write_tiny(
    kind: str, directory: Path, *, max_shard_size: str = "1GB", seed: int = 0, **overrides: object
) -> Path:
    """Write a random fp32 model of `kind` (llama, mistral, qwen2, qwen3) into `directory`.

    3 layers, hidden 96, 6 query heads, 3 KV heads, vocabulary 160, context 512; `overrides`
    are keys of the family's transformers config. Biases and norms are random too, and weights
    large enough for logits to differ by several units. Returns `directory`.
    """
    config_class, model_class = _FAMILIES[kind]
    config = config_class(**{**_SHAPE, **_OVERRIDES.get(kind, {}), **overrides})
    model = model_class(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.1 if parameter.ndim > 1 else 0.3
            parameter.copy_(noise * scale + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return Path(directory)


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; a value of None removes the key."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


_GGUF_MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    directory: Path,
    path: Path,
    *,
    matrix_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: dict[str, object] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write the checkpoint in `directory` as one GGUF file, as llama.cpp's converter would.

    Norms and biases stay fp32, matrices become `matrix_type`. `metadata`: further keys without
    their architecture prefix (int, float, str or bool). Returns `path`.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = model.config
    arch = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = model.model.layers[0].self_attn.head_dim
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    add = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        bool: writer.add_bool,
    }
    for key, value in (metadata or {}).items():
        add[type(value)](key if "." in key and key.startswith("token") else f"{arch}.{key}", value)
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            values = _permute(values, head_dim)
        kind = matrix_type if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(_gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, inner = module.split(".", 3)
        return f"blk.{layer}.{_GGUF_MODULES[inner]}.{parameter}"
    return f"{_GGUF_MODULES[module]}.{parameter}"


def _permute(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Half-split rows of each head to interleaved ones."""
    halves = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
