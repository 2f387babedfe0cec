"""Keys cut into parts that run beside one another, where few rows would leave a device idle.

Split-K, as in Flash-Decoding. Suffix S: parts; the tensors' other axes are the kernel's.
"""

import torch
import triton
from torch import Tensor

# Programs of these kernels that one multiprocessor holds.
PROGRAMS_PER_PROCESSOR = 2
# A part has as many keys at least: below, its start and its merge cost more than it saves.
MIN_KEYS = 512


def choose_parts(num_programs: int, num_keys: int, device: torch.device) -> int:
    """Parts to cut `num_keys` keys into, where whole they take `num_programs` programs."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    room = processors * PROGRAMS_PER_PROCESSOR // num_programs
    return max(min(room, triton.cdiv(num_keys, MIN_KEYS)), 1)


def merge_parts(o: Tensor, lse: Tensor, axis: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Merge fp32 partial outputs o [..., S, ..., D] of parts along `axis`, and their lse.

    Returns o of `dtype` and lse without that axis. A part that saw no key has o = 0, lse = -inf.
    """
    merged = torch.logsumexp(lse, axis)
    # Where no part saw a key: -inf - -inf is NaN, a finite stand-in makes all weights 0.
    stable = merged.clamp_min(torch.finfo(torch.float32).min).unsqueeze(axis)
    weights = torch.exp(lse - stable).unsqueeze(-1)
    return (o * weights).sum(axis).to(dtype), merged
