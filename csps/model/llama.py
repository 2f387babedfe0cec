"""Llama-family decoder (Llama, Mistral, Qwen2, Qwen3) on one rank; knows of no other rank.

Shapes: T tokens (of any number of sequences), N rows, E hidden size, V vocabulary,
H query heads, K KV heads, G = H/K query heads per KV head, D head dimension.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csps.attention.backends import RotateRows
from csps.attention.rotate import rotate_rows
from csps.core.model_config import ModelConfig
from csps.model.layers import Linear, RMSNorm, empty_parameter, linear, upcasts
from csps.model.rope import rope_table


class Attend(Protocol):
    """Attention of one forward pass: knows the sequences and their KV, scales by 1/sqrt(D)."""

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Output [T, H, D] of the new tokens' queries.

        q [T, H, D] and k [T, K, D] are as the pass's `RotateRows` gave them; query heads hG ..
        hG + G - 1 use KV head h. All are of the model's dtype; q and k are contiguous, v is a
        strided view of the projections' output.
        """
        ...


class Attention(nn.Module):
    """The projections around the attention itself.

    Rows of the fused `qkv` weight are KV-head-major: for each KV head its G query heads, its
    key, its value. So a range of KV heads, with the query heads that use them, is one
    contiguous range of rows.
    """

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str, upcast: bool
    ) -> None:
        super().__init__()
        self.num_kv_heads, self.group_size = config.num_kv_heads, config.group_size
        self.head_dim = config.head_dim
        heads = config.num_kv_heads * (config.group_size + 2)
        self.qkv: nn.Module = Linear.empty(
            config.hidden_size,
            heads * config.head_dim,
            bias=config.qkv_bias,
            dtype=dtype,
            device=device,
            upcast=upcast,
        )
        self.output: nn.Module = Linear.empty(
            config.num_heads * config.head_dim,
            config.hidden_size,
            bias=config.output_bias,
            dtype=dtype,
            device=device,
            upcast=upcast,
        )
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            eps = config.rms_norm_eps
            self.q_norm = RMSNorm(config.head_dim, eps, dtype=dtype, device=device)
            self.k_norm = RMSNorm(config.head_dim, eps, dtype=dtype, device=device)

    def forward(self, x_TE: Tensor, layer: int, rotate: RotateRows, attend: Attend) -> Tensor:
        T, K, G, D = x_TE.shape[0], self.num_kv_heads, self.group_size, self.head_dim
        qkv = self.qkv(x_TE).view(T, K, G + 2, D)
        qk, v_TKD = qkv[:, :, : G + 1], qkv[:, :, G + 1]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :, :G]), self.k_norm(qk[:, :, G:])), dim=2)
        q_THD, k_TKD = rotate(layer, qk, v_TKD)
        o_THD = attend(layer, q_THD, k_TKD, v_TKD)
        return self.output(o_THD.reshape(T, K * G * D))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str, upcast: bool
    ) -> None:
        super().__init__()

        def projection(num_inputs: int, num_outputs: int) -> Linear:
            bias = config.mlp_bias
            return Linear.empty(
                num_inputs, num_outputs, bias=bias, dtype=dtype, device=device, upcast=upcast
            )

        self.gate = projection(config.hidden_size, config.intermediate_size)
        self.up = projection(config.hidden_size, config.intermediate_size)
        self.down: nn.Module = projection(config.intermediate_size, config.hidden_size)

    def forward(self, x_TE: Tensor) -> Tensor:
        # In place: these are the largest activations of the model.
        return self.down(F.silu(self.gate(x_TE), inplace=True).mul_(self.up(x_TE)))


class DecoderLayer(nn.Module):
    """Pre-norm residual block: attention, then SwiGLU."""

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str, upcast: bool
    ) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(size, eps, dtype=dtype, device=device)
        self.attention = Attention(config, dtype=dtype, device=device, upcast=upcast)
        self.mlp_norm = RMSNorm(size, eps, dtype=dtype, device=device)
        self.mlp = SwiGLU(config, dtype=dtype, device=device, upcast=upcast)

    def forward(self, x_TE: Tensor, layer: int, rotate: RotateRows, attend: Attend) -> Tensor:
        """Adds to `x_TE` in place and returns it."""
        x_TE += self.attention(self.attention_norm(x_TE), layer, rotate, attend)
        x_TE += self.mlp(self.mlp_norm(x_TE))
        return x_TE


class Llama(nn.Module):
    """The whole model. Parameters are created empty: csps.model.loader fills them.

    `max_position` bounds the positions `forward` accepts; it may be more or less than
    config.max_position (csps.model.rope says what that means for dynamic NTK).
    Meant to run under torch.inference_mode, which is the caller's business.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        max_position: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.max_position = max_position
        self.upcast = upcasts(dtype, device)
        vocab_size, hidden_size = config.vocab_size, config.hidden_size
        self.embedding = empty_parameter(vocab_size, hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, dtype=dtype, device=device, upcast=self.upcast)
            for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.head = (
            self.embedding
            if config.tie_embeddings
            else empty_parameter(vocab_size, hidden_size, dtype=dtype, device=device)
        )
        table = rope_table(config.rope, config.head_dim, max_position, device)
        self.rope_PD: Tensor
        self.register_buffer("rope_PD", table, persistent=False)

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        rotate: RotateRows | None = None,
    ) -> Tensor:
        """Residual stream [T, E] after the last layer, before the final norm.

        token_ids and positions: int64 [T], positions below max_position, in any order; which
        tokens see which is up to `attend`, called once per layer. `rotate`: prepared with
        `rope_PD` and these positions; None where nothing is to be stored on the way.
        """
        x_TE = F.embedding(token_ids_T, self.embedding)
        rotate = rotate or rotate_rows(self.rope_PD, positions_T)
        for index, layer in enumerate(self.layers):
            x_TE = layer(x_TE, index, rotate, attend)
        return x_TE

    def logits(self, hidden_NE: Tensor) -> Tensor:
        """fp32 [N, V] of rows of what `forward` returned; the caller picks the rows."""
        normed = self.norm(hidden_NE)
        return linear(normed, self.head, None, upcast=self.upcast, out_dtype=torch.float32)
