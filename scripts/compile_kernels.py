"""Compile every kernel for a GPU that need not be there, and say what each takes of it.

    PYTHONPATH=.:kernels python -m scripts.compile_kernels            # for Hopper (sm_90), bf16
    PYTHONPATH=.:kernels python -m scripts.compile_kernels --only block_sparse --dtype float32

Through the kernels' own wrappers on the shapes of `make bench-gpu`'s parity cases, so that tilings,
stages and alignments are those that will be launched; nothing is. Ends with an error if a kernel
does not compile or takes more shared memory than a program may have.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from scripts.bench_gpu import parity_attention, parity_moves
from scripts.bench_gpu.bench import Bench
from scripts.bench_gpu.sizes import FULL

# Of a Hopper program, bytes: 228 KiB of a multiprocessor less 1 for the system.
MAX_SHARED = 227 << 10
DTYPES = ("bfloat16", "float16", "float32")


class AbsentGpu:
    """What Triton asks its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """In place of a launch: kernels are compiled, and the new ones printed."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self.too_large: list[str] = []

    def install(self) -> None:
        launch: Callable[..., Any] = JITFunction.run

        def run(function: JITFunction, *arguments: Any, warmup: bool, **options: Any) -> Any:
            begun = time.perf_counter()
            kernel = launch(function, *arguments, warmup=True, **options)
            self._report(function.fn.__name__, kernel, time.perf_counter() - begun)
            return kernel

        JITFunction.run = run

    def _report(self, name: str, kernel: Any, seconds: float) -> None:
        if kernel.hash in self._seen:
            return
        self._seen.add(kernel.hash)
        shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
        ptx = kernel.asm["ptx"]
        print(
            f"    {name:16} {warps} warps, {shared:6} bytes shared, {ptx.count('wgmma.mma'):3} "
            f"wgmma, {ptx.count('mma.sync'):3} mma, {len(kernel.asm['cubin']):7} bytes, "
            f"{seconds:.1f} s",
            flush=True,
        )
        if shared > MAX_SHARED:
            self.too_large.append(name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose names begin so")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--capability", type=int, default=90, help="compute capability, times 10")
    asked = parser.parse_args()
    driver.set_active(AbsentGpu(asked.capability))
    compiled = Compiled()
    compiled.install()
    bench = Bench(
        device=torch.device("cpu"),
        dtype=getattr(torch, asked.dtype),
        sizes=FULL,
        floors=None,
        model="",
        deadline=0.0,
        save=lambda rows: None,
    )
    print(f"Triton {triton.__version__}, sm_{asked.capability}, {asked.dtype}")
    failed = []
    for source in (parity_attention.checks, parity_moves.checks):
        for name, make in source(bench):
            if not name.startswith(asked.only):
                continue
            print(name, flush=True)
            try:
                make()[0]()
            except Exception as error:
                print(f"    {type(error).__name__}: {error}")
                failed.append(name)
    if failed or compiled.too_large:
        sys.exit(f"failed: {', '.join(failed + compiled.too_large)}")


if __name__ == "__main__":
    main()
