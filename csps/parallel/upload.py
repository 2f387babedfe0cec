"""Numbers that steer a step, from the host to the device."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copies of 1-dimensional arrays of 8-byte types, in one transfer that no one waits for.

    On a CPU they share the arrays' memory.
    """
    if device.type == "cpu" or not arrays:
        return [torch.from_numpy(array) for array in arrays]
    # Pinned: from pageable memory the host would wait for all that the device has to do before.
    packed = torch.empty(sum(map(len, arrays)), dtype=torch.int64, pin_memory=True)
    np.concatenate([array.view(np.int64) for array in arrays], out=packed.numpy())
    parts = packed.to(device, non_blocking=True).split([len(array) for array in arrays])
    return [
        part.view(torch.from_numpy(array).dtype) for part, array in zip(parts, arrays, strict=True)
    ]


def refill(tensor: Tensor, array: np.ndarray) -> None:
    """Copy an array over a tensor of its shape and type; no one waits."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    host.numpy()[...] = array
    tensor.copy_(host, non_blocking=True)
