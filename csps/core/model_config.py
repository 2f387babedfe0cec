"""Shape and constants of a Llama-family model, whatever file they were read from."""

import math
from dataclasses import dataclass
from enum import StrEnum


class RopeScaling(StrEnum):
    """How rotary frequencies are changed for contexts longer than the training one."""

    NONE = "none"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    YARN = "yarn"
    LLAMA3 = "llama3"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding, half-split (Hugging Face) convention.

    Names follow Hugging Face `rope_scaling`. Fields a kind does not use are ignored.
    """

    theta: float = 10_000.0
    scaling: RopeScaling = RopeScaling.NONE
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only model: RMSNorm, rotary attention (GQA), SwiGLU.

    `max_position` is the context length the checkpoint claims, in tokens.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    rope: RopeConfig
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def group_size(self) -> int:
        """Query heads per KV head (G)."""
        return self.num_heads // max(self.num_kv_heads, 1)  # a rank's part may have no heads

    @property
    def softmax_scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim)

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of K and V of one token in all layers and heads."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes

    def num_parameters(self) -> int:
        """Weights of the model, counting a tied embedding once."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        layer = attention + mlp + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size
