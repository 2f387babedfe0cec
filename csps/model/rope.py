"""Rotary position embedding with the frequency scalings of transformers' modeling_rope_utils.

Shapes: P positions, T tokens, D head dimension (even).
"""

import math

import torch
from torch import Tensor

from csps.core.model_config import RopeConfig, RopeScaling


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_position: int) -> tuple[Tensor, float]:
    """Inverse frequencies, fp32 [D/2] on the CPU, and the factor on cos and sin.

    Dynamic NTK (u/emozilla) depends on the length of the sequence, which transformers takes
    anew at each forward pass; keys cached before a growth keep their old rotation there. Here
    one table serves every request, so the frequencies are those of a sequence of
    `max_position` tokens: up to the original length (`max_position` <= it) they are
    transformers' exactly; a server for longer contexts uses the longer length for all.
    """
    theta = rope.theta
    if rope.scaling is RopeScaling.DYNAMIC:
        length = max(max_position, rope.original_max_position)
        stretch = rope.factor * length / rope.original_max_position - (rope.factor - 1)
        theta *= stretch ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / theta**exponents
    match rope.scaling:
        case RopeScaling.LINEAR:
            return frequencies / rope.factor, 1.0
        case RopeScaling.LLAMA3:
            return _llama3(rope, frequencies), 1.0
        case RopeScaling.YARN:
            return _yarn(rope, frequencies, head_dim), _yarn_attention_factor(rope)
        case RopeScaling.NONE | RopeScaling.DYNAMIC:
            return frequencies, 1.0


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1: slow frequencies divided by the factor, fast ones kept, a ramp between."""
    rotations = rope.original_max_position * frequencies / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = ((rotations - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * frequencies / rope.factor + keep * frequencies


def _yarn(rope: RopeConfig, frequencies: Tensor, head_dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): a ramp over dimensions between the betas."""

    def dimension(num_rotations: float) -> float:
        # The dimension that turns num_rotations times within the original context.
        wavelengths = rope.original_max_position / (num_rotations * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as transformers does, against a division by zero
    ramp = ((torch.arange(head_dim // 2).float() - low) / (high - low)).clamp(0.0, 1.0)
    return ramp * frequencies / rope.factor + (1 - ramp) * frequencies


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def rope_table(
    rope: RopeConfig, head_dim: int, max_position: int, device: torch.device | str
) -> Tensor:
    """cos and sin of every position below `max_position`: fp32 [P, D], cos in [:, :D/2]."""
    frequencies, factor = inverse_frequencies(rope, head_dim, max_position)
    positions = torch.arange(max_position, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies.to(device))
    table = torch.empty(max_position, head_dim, dtype=torch.float32, device=device)
    torch.cos(angles, out=table[:, : head_dim // 2])
    torch.sin(angles, out=table[:, head_dim // 2 :])
    return table.mul_(factor)
