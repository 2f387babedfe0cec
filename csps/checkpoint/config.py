"""The model configuration of a checkpoint of either kind."""

from csps.checkpoint.config_gguf import read_gguf_config
from csps.checkpoint.config_hf import read_hf_config
from csps.checkpoint.locate import Checkpoint
from csps.core.model_config import ModelConfig


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    """Shape and constants of the model; reads no weights.

    CheckpointError naming what is missing, malformed or not supported.
    """
    if checkpoint.kind == "gguf":
        return read_gguf_config(checkpoint.path)
    return read_hf_config(checkpoint.path)
