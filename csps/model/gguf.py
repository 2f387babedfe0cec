"""Weights of a GGUF file, dequantised; llama.cpp's order of q and k rows put back."""

import re
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from csps.checkpoint.config_gguf import ROPE_FACTORS
from csps.checkpoint.gguf_metadata import GgufTensor, read_header
from csps.core.errors import CheckpointError
from csps.core.model_config import ModelConfig

# Hugging Face module -> llama.cpp tensor (its `tensor_mapping`), outside and inside a layer.
_MODEL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_PERMUTED = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)")


class GgufSource:
    """The tensors of a GGUF file (csps.model.source), memory-mapped while it lives."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._path = path
        # As a plain array: slices of a memmap object cost 10 us each, and dequantize makes many.
        self._data = np.asarray(np.memmap(path, mode="r"))
        self._tensors = {tensor.name: tensor for tensor in read_header(path).tensors}
        self._head_dim = config.head_dim
        # llama.cpp's converter permutes for `llama` files alone (Llama and Mistral models).
        self._permuted = config.architecture == "LlamaForCausalLM"
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def file_name(self, name: str) -> str:
        module, _, parameter = name.rpartition(".")
        layer = _LAYER.fullmatch(module)
        if layer is None:
            return f"{_MODEL_NAMES[module]}.{parameter}"
        return f"blk.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{parameter}"

    def is_ignorable(self, file_name: str) -> bool:
        return file_name == ROPE_FACTORS  # part of the configuration

    def read(self, file_name: str, rows: slice, columns: slice) -> Tensor:
        tensor = self._tensors[file_name]
        values = torch.from_numpy(self._dequantize(tensor, rows))
        if self._permuted and _PERMUTED.fullmatch(file_name):
            values = unpermute(values, self._head_dim)
        return values if values.ndim == 1 else values[:, columns]

    def _dequantize(self, tensor: GgufTensor, rows: slice) -> np.ndarray:
        """fp32 values of those rows (of a vector: those elements), owned by the array."""
        try:
            kind = GGMLQuantizationType(tensor.type_id)
            block_size, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise self._unreadable(tensor, f"has unknown type {tensor.type_id}") from error
        num_rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
        if tensor.shape[-1] % block_size:
            raise self._unreadable(tensor, f"has rows that are no multiple of {block_size}")
        row_bytes = tensor.shape[-1] // block_size * block_bytes
        data = self._data[tensor.offset : tensor.offset + num_rows * row_bytes]
        if len(data) < num_rows * row_bytes:
            raise self._unreadable(tensor, "is cut short")
        matrix = data.reshape(num_rows, row_bytes)
        is_vector = len(tensor.shape) == 1
        try:
            # dequantize gives a view for fp32: copied, for the file is read-only.
            values = np.array(dequantize(matrix if is_vector else matrix[rows], kind), np.float32)
        except NotImplementedError as error:
            raise self._unreadable(tensor, f"is {kind.name}, which gguf cannot read") from error
        return values.reshape(-1)[rows] if is_vector else values

    def _unreadable(self, tensor: GgufTensor, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {tensor.name} {problem}")


def unpermute(x: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k from llama.cpp's interleaved order within each head to half-split order.

    `x` [heads * D, ...] holds (first, second) of each rotated pair side by side; the result
    holds all firsts, then all seconds (llama.cpp convert_hf_to_gguf.py, LlamaModel.permute).
    """
    pairs = x.reshape(-1, head_dim // 2, 2, *x.shape[1:])
    return pairs.transpose(1, 2).reshape(x.shape)
