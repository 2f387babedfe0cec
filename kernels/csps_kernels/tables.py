"""Integers that steer a kernel, from the host to the device."""

import numpy as np
import torch
from torch import Tensor

# Integers in 16 bytes: a kernel is compiled anew for pointers that are aligned otherwise.
ALIGNMENT = 4


def padded_size(size: int) -> int:
    """Integers that an array of `size` takes in a packed table."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def upload(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copies of `arrays`, int32, in one transfer that the host does not wait for."""
    sizes = [padded_size(array.size) for array in arrays]
    table = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    for part, array in zip(table.split(sizes), arrays, strict=True):
        part.numpy()[: array.size] = array.ravel()
    parts = table.to(device, non_blocking=True).split(sizes)
    return [part[: array.size].view(array.shape) for part, array in zip(parts, arrays, strict=True)]
