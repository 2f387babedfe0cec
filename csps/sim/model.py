"""Shapes of the models that can be simulated, and what they weigh."""

from dataclasses import dataclass
from enum import StrEnum

from csps.core.heads import all_heads
from csps.core.model_config import ModelConfig, RopeConfig
from csps.sim.files import read_table


class WeightType(StrEnum):
    """Type of the matrices of the layers; everything else is bfloat16."""

    BFLOAT16 = "bfloat16"
    FP8 = "fp8"


ELEMENT_BYTES = 2  # of activations, KV and embeddings: bfloat16


@dataclass(frozen=True, slots=True)
class SimModel:
    """A model of a known shape whose matrices have type `weights`."""

    name: str
    config: ModelConfig
    weights: WeightType

    @property
    def layer_parameters(self) -> int:
        """Weights in the matrices of all layers."""
        c = self.config
        attention = 2 * c.hidden_size * c.head_dim * (c.num_heads + c.num_kv_heads)
        return c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size)

    @property
    def layer_bytes(self) -> int:
        """Of the matrices of all layers: what a step reads."""
        return self.layer_parameters * (1 if self.weights is WeightType.FP8 else ELEMENT_BYTES)

    @property
    def head_bytes(self) -> int:
        """Of the matrix that makes logits."""
        return self.config.vocab_size * self.config.hidden_size * ELEMENT_BYTES

    @property
    def weight_bytes(self) -> int:
        """Of everything."""
        others = self.config.num_parameters() - self.layer_parameters
        return self.layer_bytes + others * ELEMENT_BYTES

    def kv_token_bytes(self, num_parts: int) -> int:
        """Of one token's K and V on the rank that has most of them, heads split in `num_parts`.

        Ranks beyond the number of KV heads keep copies (csps.core.heads).
        """
        parts = all_heads(self.config.num_heads, self.config.num_kv_heads).split(num_parts)
        heads = max(part.num_kv_heads for part in parts)
        return 2 * self.config.num_layers * heads * self.config.head_dim * ELEMENT_BYTES

    def most_heads(self, num_parts: int) -> int:
        """Query heads of the rank that has most, heads split in `num_parts`."""
        parts = all_heads(self.config.num_heads, self.config.num_kv_heads).split(num_parts)
        return max(part.num_heads for part in parts)


def load_model(name: str, weights: WeightType = WeightType.BFLOAT16) -> SimModel:
    """A shipped model by name, or a file of the same form. ConfigError names what is wrong."""
    table = read_table("--model", "models", name)
    table.text("source")
    config = ModelConfig(
        architecture="llama",
        vocab_size=table.integer("vocab_size", 1),
        hidden_size=table.integer("hidden_size", 1),
        intermediate_size=table.integer("intermediate_size", 1),
        num_layers=table.integer("num_layers", 1),
        num_heads=table.integer("num_heads", 1),
        num_kv_heads=table.integer("num_kv_heads", 1),
        head_dim=table.integer("head_dim", 1),
        rms_norm_eps=1e-5,
        max_position=table.integer("max_position", 1),
        rope=RopeConfig(),
        tie_embeddings=bool(table.values.get("tie_embeddings", False)),
    )
    if config.num_heads % config.num_kv_heads:
        raise table.error("num_kv_heads", f"does not divide num_heads {config.num_heads}")
    return SimModel(table.text("name"), config, weights)
