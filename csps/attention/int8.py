"""Vectors on the wire as int8, with one scale each."""

import torch
from torch import Tensor

INT8_MAX = 127.0
# Keeps a vector of zeros from dividing by zero; fp16 can hold it.
MIN_SCALE = 1e-6


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 of x's shape, and the scale of each vector along the last dimension, fp16."""
    x = x.float()
    scale = (x.abs().amax(-1) / INT8_MAX).clamp_min(MIN_SCALE).half()
    # By the rounded scale, which is the one the other end has.
    quantized = (x / scale.float().unsqueeze(-1)).round_().clamp_(-INT8_MAX, INT8_MAX)
    return quantized.to(torch.int8), scale


def dequantize(quantized: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `quantize`, up to rounding: fp32."""
    return quantized.float() * scale.float().unsqueeze(-1)
