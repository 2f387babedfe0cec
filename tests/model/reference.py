"""Our model and transformers' on the same checkpoint, in fp32 on the CPU."""

from pathlib import Path

import torch
import transformers
from torch import Tensor

from csps.checkpoint.config import read_config
from csps.checkpoint.locate import locate
from csps.model.llama import Attend, Llama
from csps.model.loader import load_model
from csps.model.local_attention import LocalAttention


def load(
    path: Path, *, dtype: torch.dtype = torch.float32, max_position: int | None = None
) -> Llama:
    """The checkpoint at `path` by csps."""
    checkpoint = locate(str(path))
    config = read_config(checkpoint)
    return load_model(
        checkpoint,
        config,
        dtype=dtype,
        device="cpu",
        max_position=max_position or config.max_position,
    )


def logits(model: Llama, token_ids: Tensor, start: int = 0, attend: Attend | None = None) -> Tensor:
    """fp32 [T, V] of tokens at positions start, start + 1, ..."""
    positions = torch.arange(start, start + len(token_ids))
    with torch.inference_mode():
        return model.logits(model(token_ids, positions, attend or LocalAttention()))


def transformers_logits(directory: Path, token_ids: Tensor, **kwargs: object) -> Tensor:
    """fp32 [T, V] by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, **kwargs
    ).eval()
    with torch.inference_mode():
        return model(token_ids[None]).logits[0]


def random_tokens(num_tokens: int, vocab_size: int = 160) -> Tensor:
    return torch.randint(0, vocab_size, (num_tokens,))
