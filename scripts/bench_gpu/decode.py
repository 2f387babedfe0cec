"""Decode's attention over paged KV, whose floor is reading that KV once, and merges.

Suffixes: N rows, H query heads, D head dim, M partials, B bytes.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import numpy as np
import torch

from csps.attention.backends import Kernels, triton
from csps.attention.merge import pack
from csps.attention.shards import Run
from csps.engine.kv_pool import KVPool
from scripts.bench_gpu.bench import Bench, NotHereError, Row

# Pages that lie together, as a scheduler that serves others too finds them.
PAGES_TOGETHER = 64
NUM_SOURCES = 4
MERGED_ROWS = (32, 1024)


def run(bench: Bench) -> None:
    """A row of each batch, then of merges of partials of NUM_SOURCES ranks."""
    for num_rows, num_keys in bench.sizes.decodes:
        for name, load in BACKENDS.items():
            bench.case(
                f"{name}: {num_rows} x {num_keys}",
                functools.partial(_decode, bench, load, num_rows, num_keys),
            )
    for num_rows in sorted({min(rows, bench.sizes.tokens) for rows in MERGED_ROWS}):
        bench.case(
            f"merge: {num_rows} rows of {NUM_SOURCES} ranks",
            functools.partial(_merge, bench, num_rows),
        )


def _triton(bench: Bench) -> Kernels:
    return triton.KERNELS


def _flashinfer(bench: Bench) -> Kernels:
    if importlib.util.find_spec("flashinfer") is None:
        raise NotHereError("flashinfer is not installed")
    module = importlib.import_module("csps.attention.backends.flashinfer")
    return module.kernels(bench.sizes.model.group_size)


BACKENDS = {"triton": _triton, "flashinfer": _flashinfer}


def _decode(bench: Bench, load: Callable[[Bench], Kernels], num_rows: int, num_keys: int) -> Row:
    paged_decode = load(bench).paged_decode
    model, size = bench.sizes.model, bench.sizes.page_size
    per_row = -(-num_keys // size)
    pool = KVPool(
        num_layers=1,
        num_pages=num_rows * per_row,
        block_size=size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        staging_blocks=0,
        dtype=bench.dtype,
        device=bench.device,
    )
    for flat in (pool.flat_keys, pool.flat_values):
        flat.normal_(generator=bench.generator)
    shards = _shards(num_rows, per_row, num_keys, size)
    q_NHD = bench.normal(num_rows, model.num_heads, model.head_dim)
    o_NHD = torch.empty_like(q_NHD)
    lse_NH = torch.empty(q_NHD.shape[:2], dtype=torch.float32, device=bench.device)
    prepared = bench.timer(lambda: paged_decode(pool, shards))
    attend = paged_decode(pool, shards)
    timing = bench.timer(lambda: attend(0, q_NHD, o_NHD, lse_NH))
    num_tokens = num_rows * num_keys
    num_bytes = num_tokens * model.num_kv_heads * model.head_dim * 2 * bench.dtype.itemsize
    row = bench.beside_floor(
        timing,
        4.0 * num_tokens * model.num_heads * model.head_dim,
        num_bytes + 2 * q_NHD.nbytes + lse_NH.nbytes,
    )
    return {**row, "prepare_s": prepared.median_s, "prepare_host_s": prepared.host_s}


def _shards(num_rows: int, per_row: int, num_keys: int, size: int) -> list[tuple[Run, ...]]:
    """Each row's pages in runs of PAGES_TOGETHER, those of all rows mixed."""
    starts = np.arange(0, num_rows * per_row, PAGES_TOGETHER)
    np.random.default_rng(num_rows).shuffle(starts)
    order = np.concatenate([np.arange(at, at + PAGES_TOGETHER) for at in starts])
    order = order[order < num_rows * per_row]
    shards = []
    for pages in order.reshape(num_rows, per_row):
        runs = []
        for part in np.split(pages, np.flatnonzero(np.diff(pages) != 1) + 1):
            left = num_keys - sum(run.num_tokens for run in runs)
            runs.append(Run(int(part[0]) * size, min(len(part) * size, left)))
        shards.append(tuple(runs))
    return shards


def _merge(bench: Bench, num_rows: int) -> Row:
    model = bench.sizes.model
    rows_by_source = [np.arange(num_rows) for _ in range(NUM_SOURCES)]
    count = NUM_SOURCES * num_rows
    o_MHD = bench.normal(count, model.num_heads, model.head_dim)
    lse_MH = bench.normal(count, model.num_heads, dtype=torch.float32)
    message_MB = pack(o_MHD, lse_MH)
    out = torch.empty_like(o_MHD[:num_rows])
    merge = triton.KERNELS.merge(rows_by_source, num_rows, bench.device)
    timing = bench.timer(lambda: merge(message_MB, out, None))
    return bench.beside_floor(timing, 0.0, message_MB.nbytes + out.nbytes)
