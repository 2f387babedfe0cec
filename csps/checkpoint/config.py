"""The model configuration of a checkpoint of either kind."""

import math
from dataclasses import replace

from csps.checkpoint.config_gguf import read_gguf_config
from csps.checkpoint.config_hf import read_hf_config
from csps.checkpoint.locate import Checkpoint
from csps.core.errors import ConfigError
from csps.core.model_config import ModelConfig, RopeScaling

# Llama 3's kind has two more constants, which only a checkpoint can know.
STRETCHES = (RopeScaling.LINEAR, RopeScaling.DYNAMIC, RopeScaling.YARN)


def read_config(checkpoint: Checkpoint, rope_scaling: str = "") -> ModelConfig:
    """Shape and constants of the model; reads no weights.

    `rope_scaling`, such as "yarn:4", makes the context so many times longer than the model's.
    CheckpointError naming what is missing, malformed or not supported; ConfigError if
    `rope_scaling` is malformed or the model is scaled already.
    """
    read = read_gguf_config if checkpoint.kind == "gguf" else read_hf_config
    config = read(checkpoint.path)
    return stretched(config, rope_scaling) if rope_scaling else config


def stretched(config: ModelConfig, rope_scaling: str) -> ModelConfig:
    """The model with a longer context: KIND:FACTOR, kind and factor as in Hugging Face."""
    kind, _, factor_text = rope_scaling.partition(":")
    try:
        factor = float(factor_text)
    except ValueError:
        factor = 0.0
    if kind not in STRETCHES or not (math.isfinite(factor) and factor > 1.0):
        kinds = ", ".join(STRETCHES)
        raise ConfigError(
            f"--rope-scaling: expected KIND:FACTOR with KIND one of {kinds} and FACTOR above 1, "
            f"such as yarn:4, got {rope_scaling!r}"
        )
    if config.rope.scaling is not RopeScaling.NONE:
        raise ConfigError(f"--rope-scaling: the model has its own, {config.rope.scaling.value}")
    rope = replace(
        config.rope,
        scaling=RopeScaling(kind),
        factor=factor,
        original_max_position=config.max_position,
    )
    return replace(config, rope=rope, max_position=int(config.max_position * factor))
