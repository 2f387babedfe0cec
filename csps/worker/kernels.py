"""What a rank attends with: what --attention-backend means on its device."""

import importlib
import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch

from csps.attention.backends import FixedDecode, Kernels, torch_cuda
from csps.attention.backends.flashinfer_tables import DTYPES, HEAD_DIMS, HOPPER_ROWS
from csps.attention.backends.torch_cpu import cpu_kernels
from csps.attention.transfer import KVShape
from csps.core.config import AttentionBackend
from csps.core.errors import ConfigError
from csps.model.layers import upcasts
from csps.worker.trial_inputs import Inputs, TrialSize, random_inputs
from csps.worker.trials import TRIALS, check, seconds

logger = logging.getLogger(__name__)

FLAG = "--attention-backend"
INSTALL = {AttentionBackend.TRITON: "csps[gpu]", AttentionBackend.FLASHINFER: "csps[flashinfer]"}
# What kernels are timed on: an 8K prompt, 4K of a sparse one, 8 streams of 8K.
TYPICAL_TOKENS, TYPICAL_TILE_TOKENS, TYPICAL_ROWS = 8192, 4096, 8


class ChosenKernels(NamedTuple):
    """`backends`: whose kernel each phase (of TRIALS) has, never AUTO."""

    backends: Mapping[str, AttentionBackend]
    kernels: Kernels

    def __str__(self) -> str:
        """Whose most kernels are, then the phases that differ: "triton (merge: torch)"."""
        ((most, _),) = Counter(self.backends.values()).most_common(1)
        others = [f"{phase}: {x}" for phase, x in self.backends.items() if x is not most]
        return f"{most} ({', '.join(others)})" if others else str(most)


def choose_kernels(
    wanted: AttentionBackend,
    shape: KVShape,
    device: torch.device,
    *,
    num_kv_heads: int,
    num_threads: int,
    for_graphs: bool = False,
) -> ChosenKernels:
    """AUTO takes torch's on a CPU, on a GPU the fastest of each phase.

    ConfigError if what is wanted is not installed, or does not run on this device with KV of
    `num_kv_heads`. `num_threads`: of a CPU's kernels. `for_graphs`: as of `fastest_by_phase`.
    """
    of_torch = torch_kernels(shape.dtype, device, num_threads=num_threads)
    is_auto = wanted is AttentionBackend.AUTO
    if wanted is AttentionBackend.TORCH or (is_auto and device.type != "cuda"):
        return ChosenKernels(dict.fromkeys(TRIALS, AttentionBackend.TORCH), of_torch)
    if not is_auto:
        kernels = _load(wanted, shape, device)
        _check_all(wanted, kernels, _few_pages(shape, num_kv_heads, device))
        torch.cuda.empty_cache()  # that memory is to be KV's
        return ChosenKernels(dict.fromkeys(TRIALS, wanted), kernels)
    begun = time.perf_counter()
    chosen = fastest_by_phase(
        {**_installed(shape, device), AttentionBackend.TORCH: of_torch},
        tried_on=_few_pages(shape, num_kv_heads, device),
        timed_on=random_inputs(shape, num_kv_heads, _typical(shape), device),
        for_graphs=for_graphs,
    )
    torch.cuda.empty_cache()
    logger.info("attention kernels chosen in %.1f s", time.perf_counter() - begun)
    return chosen


def torch_kernels(dtype: torch.dtype, device: torch.device, *, num_threads: int) -> Kernels:
    """torch's fused attention on `device`."""
    if device.type == "cuda":
        return torch_cuda.KERNELS
    return cpu_kernels(upcast=upcasts(dtype, device), num_threads=num_threads)


def fastest_by_phase(
    offered: Mapping[AttentionBackend, Kernels],
    *,
    tried_on: Inputs,
    timed_on: Inputs,
    for_graphs: bool = False,
) -> ChosenKernels:
    """Of each phase's kernels that are right on `tried_on`, the one that is fastest on `timed_on`.

    A kernel that two backends share counts as the first one's. ConfigError if none is right.
    `for_graphs`: decode that CUDA graphs can run comes first, where there is one.
    """
    backends: dict[str, AttentionBackend] = {}
    for phase in TRIALS:
        # By kernel: the first backend that has it.
        first = {getattr(x, phase): backend for backend, x in reversed(offered.items())}
        times: dict[AttentionBackend, float] = {}
        failures: list[str] = []
        for backend in reversed(first.values()):
            try:
                check(phase, offered[backend], tried_on)
                times[backend] = seconds(phase, offered[backend], timed_on)
            except Exception as error:  # whatever it is, others may do better
                failures.append(f"{backend}: {_one_line(error)}")
        logger.info("%s: %s", phase, ", ".join(f"{x} {1e3 * s:.3f} ms" for x, s in times.items()))
        for failure in failures:
            logger.warning("%s is not computed by %s", phase, failure)
        if not times:
            raise ConfigError(f"{FLAG}: no kernel for {phase} runs here ({'; '.join(failures)})")
        fixed = {x for x in times if isinstance(offered[x].paged_decode, FixedDecode)}
        best = fixed if fixed and for_graphs and phase == "paged_decode" else times
        backends[phase] = min(best, key=times.__getitem__)
    return ChosenKernels(
        backends, Kernels(**{phase: getattr(offered[x], phase) for phase, x in backends.items()})
    )


def _check_all(wanted: AttentionBackend, kernels: Kernels, inputs: Inputs) -> None:
    """A GPU needs a driver, a C compiler and shared memory for the shapes, for instance."""
    for phase in TRIALS:
        try:
            check(phase, kernels, inputs)
        except Exception as error:
            device = inputs.q_TKGD.device
            where = device if device.type == "cuda" else "a CPU: it needs a GPU"
            raise ConfigError(
                f"{FLAG}: {wanted} cannot run on {where} ({phase}: {_one_line(error)})"
            ) from error


def _installed(shape: KVShape, device: torch.device) -> dict[AttentionBackend, Kernels]:
    """Backends beside torch, as far as they can be loaded for `shape`."""
    found: dict[AttentionBackend, Kernels] = {}
    for backend in (AttentionBackend.TRITON, AttentionBackend.FLASHINFER):
        try:
            found[backend] = _load(backend, shape, device)
        except ConfigError as error:
            level = logging.WARNING if backend is AttentionBackend.TRITON else logging.INFO
            logger.log(level, "attending without %s: %s", backend, error)
    return found


def _load(wanted: AttentionBackend, shape: KVShape, device: torch.device) -> Kernels:
    """Import a backend; its kernels are yet to be tried."""
    if wanted is AttentionBackend.FLASHINFER:
        _check_flashinfer(shape, device)
    try:
        module = importlib.import_module(f"csps.attention.backends.{wanted}")
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ConfigError(
            f"{FLAG}: {package} is not installed: pip install '{INSTALL[wanted]}'"
        ) from None
    except Exception as error:  # a broken installation fails in many ways
        raise ConfigError(f"{FLAG}: {wanted} cannot be imported: {_one_line(error)}") from error
    kernels: Kernels = (
        module.kernels(shape.group_size)
        if wanted is AttentionBackend.FLASHINFER
        else module.KERNELS
    )
    return kernels


def _check_flashinfer(shape: KVShape, device: torch.device) -> None:
    """ConfigError says what about this rank it has no kernels for."""
    if device.type != "cuda":
        raise ConfigError(f"{FLAG}: flashinfer needs a GPU and CUDA; triton and torch run on CPUs")
    if shape.dtype not in DTYPES:
        raise ConfigError(
            f"{FLAG}: flashinfer has no kernels for {str(shape.dtype).removeprefix('torch.')}: "
            "--dtype bfloat16"
        )
    if shape.head_dim not in HEAD_DIMS:
        raise ConfigError(
            f"{FLAG}: flashinfer has kernels for head dims {HEAD_DIMS}, not {shape.head_dim}"
        )


def _few_pages(shape: KVShape, num_kv_heads: int, device: torch.device) -> Inputs:
    """Two; on a GPU, prompts that fill it: kernels for few rows may be others."""
    num_tokens = 2 * shape.block_size
    if device.type == "cuda":
        num_processors = torch.cuda.get_device_properties(device).multi_processor_count
        num_heads = num_kv_heads * shape.group_size
        num_tokens = max(num_tokens, -(-num_processors // num_heads) * HOPPER_ROWS)
    size = TrialSize(num_tokens, num_tiles=2, pages_per_tile=2, num_rows=3, pages_per_row=2)
    return random_inputs(shape, num_kv_heads, size, device)


def _typical(shape: KVShape) -> TrialSize:
    """Sparse tiles see a quarter of their pages."""
    num_tiles = -(-TYPICAL_TILE_TOKENS // shape.block_size)
    return TrialSize(
        TYPICAL_TOKENS,
        num_tiles=num_tiles,
        pages_per_tile=-(-num_tiles // 4),
        num_rows=TYPICAL_ROWS,
        pages_per_row=-(-TYPICAL_TOKENS // shape.block_size),
    )


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
