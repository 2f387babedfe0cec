"""What a rank attends with: what --attention-backend means on its device.

Suffixes: T rows or tokens of a page, H query heads, G query heads of a KV head, D head dim, I
items, R rows of an item, P pages, B tokens of a page.
"""

import importlib
import logging
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csps.attention.backends import Kernels, PageLists, torch_cuda
from csps.attention.backends.torch_cpu import cpu_kernels
from csps.attention.int8 import quantize
from csps.attention.score import BlockKeys
from csps.attention.select import Rows
from csps.attention.transfer import KVShape
from csps.core.config import AttentionBackend
from csps.core.errors import ConfigError
from csps.model.layers import upcasts

logger = logging.getLogger(__name__)

FLAG = "--attention-backend"
# Of bf16 against fp32, on normal inputs.
TOLERANCE = 3e-2


class ChosenKernels(NamedTuple):
    """`backend` is never AUTO."""

    backend: AttentionBackend
    kernels: Kernels


def choose_kernels(
    wanted: AttentionBackend, shape: KVShape, device: torch.device, *, num_threads: int
) -> ChosenKernels:
    """ConfigError if TRITON is wanted and not installed, or this device cannot run it.

    AUTO tries it on GPUs alone. `num_threads`: of a CPU's kernels.
    """
    if wanted is AttentionBackend.TRITON or (
        wanted is AttentionBackend.AUTO and device.type == "cuda"
    ):
        try:
            return ChosenKernels(AttentionBackend.TRITON, _triton_kernels(shape, device))
        except ConfigError as error:
            if wanted is AttentionBackend.TRITON:
                raise
            logger.warning("attending with torch: %s", error)
    return ChosenKernels(
        AttentionBackend.TORCH, torch_kernels(shape.dtype, device, num_threads=num_threads)
    )


def torch_kernels(dtype: torch.dtype, device: torch.device, *, num_threads: int) -> Kernels:
    """torch's fused attention on `device`."""
    if device.type == "cuda":
        return torch_cuda.KERNELS
    return cpu_kernels(upcast=upcasts(dtype, device), num_threads=num_threads)


def _triton_kernels(shape: KVShape, device: torch.device) -> Kernels:
    """Triton's, tried out: it needs a driver, a C compiler and shared memory for the shapes."""
    try:
        kernels: Kernels = importlib.import_module("csps.attention.backends.triton").KERNELS
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{FLAG}: {error.name} is not installed: pip install 'csps[gpu]'"
        ) from None
    except Exception as error:  # a broken installation fails in many ways
        raise ConfigError(f"{FLAG}: triton cannot be imported: {_one_line(error)}") from error
    try:
        _try_out(kernels, shape, device)
    except Exception as error:
        where = device if device.type == "cuda" else "a CPU: it needs a GPU"
        raise ConfigError(f"{FLAG}: triton cannot run on {where} ({_one_line(error)})") from error
    return kernels


def _try_out(kernels: Kernels, shape: KVShape, device: torch.device) -> None:
    """AssertionError if a kernel is wrong on a page of random tokens; what it raises itself."""
    generator = torch.Generator().manual_seed(0)
    q_THD, k_T1D, v_T1D = (
        torch.randn(shape.block_size, heads, shape.head_dim, generator=generator).to(shape.dtype)
        for heads in (shape.group_size, 1, 1)
    )
    expected = _run_each(
        cpu_kernels(upcast=False, num_threads=1), *(x.float() for x in (q_THD, k_T1D, v_T1D))
    )
    got = _run_each(kernels, *(x.to(device) for x in (q_THD, k_T1D, v_T1D)))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.float().cpu(), other, rtol=TOLERANCE, atol=TOLERANCE)


def _run_each(kernels: Kernels, q_THD: Tensor, k_T1D: Tensor, v_T1D: Tensor) -> list[Tensor]:
    """o and lse of every kernel."""
    causal = kernels.partial(q_THD, k_T1D, v_T1D, causal=True)
    last = kernels.partial(q_THD[-1:], k_T1D, v_T1D, causal=False)
    q_1GTD = q_THD.transpose(0, 1).contiguous()[None]
    k_1TD, v_1TD = (x.transpose(0, 1).contiguous() for x in (k_T1D, v_T1D))
    one_page = torch.tensor([0, 1], dtype=torch.int32, device=k_1TD.device)
    lists = PageLists(one_page, one_page[:1].clone(), longest=1)
    sparse = kernels.block_sparse(q_1GTD.flatten(1, 2), k_1TD, v_1TD, lists)
    diagonal = kernels.diagonal(q_1GTD, k_1TD, v_1TD)
    probes = Rows(*quantize(q_1GTD[:, :1, :0]), q_1GTD[:, :1])
    positions = np.arange(len(k_T1D))[None, None]
    scores = kernels.score(
        probes, positions, np.array([0]), BlockKeys(k_1TD, np.array([[0]])), np.array([0])
    )
    return [*causal, *last, *sparse, *diagonal, scores.lse]


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
