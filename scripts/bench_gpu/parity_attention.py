"""Parity cases of the attention kernels: Llama-3.1-8B's heads, and shapes that fill no tile.

Suffixes: I items, R rows of an item, P pages, B tokens of a page, D head dim, N rows or sequences,
H query heads, K KV heads, T tokens.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csps.attention.select import WINDOW_BLOCKS
from csps_kernels import block_sparse, paged_decode, score
from csps_kernels.causal import attention
from csps_kernels.choose import choose
from csps_kernels.twins import block_sparse as block_sparse_twin
from csps_kernels.twins import paged_decode as paged_decode_twin
from csps_kernels.twins import score as score_twin
from csps_kernels.twins.causal import attention as attention_twin
from csps_kernels.twins.choose import choose as choose_twin
from scripts.bench_gpu.bench import Bench

GAMMA = 0.95

Parts = Callable[[], tuple[Tensor, ...]]
# What the kernel computes, and what its twin does.
Pair = tuple[Parts, Parts]
Case = tuple[str, Callable[[], Pair]]


def checks(bench: Bench) -> Iterator[Case]:
    """Name of each case, and what makes its data."""
    model, size = bench.sizes.model, bench.sizes.page_size
    group, heads, dim = model.group_size, model.num_kv_heads, model.head_dim
    most = bench.sizes.parity_keys // size
    rows = group * size

    def case(kernel: Callable[..., Pair], name: str, *arguments: Any, **options: Any) -> Case:
        label = f"{kernel.__name__.strip('_')}: {name}"
        return label, functools.partial(kernel, bench, *arguments, **options)

    yield case(_block_sparse, "model", [most, 0, 1, most // 3 + 1], rows, size, dim)
    yield case(_block_sparse, "lists in parts", [most, 0, 1], rows, size, dim, num_parts=3)
    yield case(_block_sparse, "one row", [2, 1], 1, size, dim)
    yield case(_block_sparse, "rows that fill no tile", [3, 2], 3 * 16 + 2, 16, 64)
    keys = bench.sizes.parity_keys
    odd = keys // 2 + 7
    yield case(_dense, "model, causal", (1, heads, group), keys, keys, dim, causal=True)
    yield case(_dense, "odd, causal", (1, 2, 3), odd, odd, 64, causal=True)
    yield case(_dense, "tiles", (8, 1, group), size, size, dim, causal=True)
    yield case(_dense, "one token", (1, heads, group), 1, keys + 5, dim, causal=False)
    yield case(_dense, "few rows", (1, 2, 3), 37, odd, 64, causal=False)
    yield case(_paged_decode, "model", [keys, 1, 0, keys // 3], heads, group, size, dim)
    yield case(_paged_decode, "small pages, odd group", [odd, 70, 0], 2, 3, 8, 64)
    yield case(_paged_decode, "one query head", [odd], heads, 1, size, dim)
    yield case(_score, "model", heads, most, group * 8, size, dim)
    yield case(_score, "odd", 3, 5, 7, 16, 64)
    yield case(_choose, "model", heads, most)
    yield case(_choose, "odd", 3, 37)


def _block_sparse(
    bench: Bench, lengths: list[int], rows: int, size: int, dim: int, num_parts: int = 0
) -> Pair:
    num_pages = 2 * max(sum(lengths), 1)
    q_IRD = bench.normal(len(lengths), rows, dim)
    k_PBD, v_PBD = (bench.normal(num_pages, size, dim) for _ in range(2))
    k_PBD[1::2] = v_PBD[1::2] = torch.nan  # pages of no list
    draw = np.random.default_rng(rows)
    lists = [draw.permutation(num_pages // 2)[:length] * 2 for length in lengths]
    starts, pages = (
        torch.from_numpy(x).int().to(bench.device)
        for x in (np.cumsum([0, *lengths]), np.concatenate(lists))
    )
    arguments = q_IRD, k_PBD, v_PBD, starts, pages, max(lengths)
    return (
        lambda: block_sparse.block_sparse(*arguments, num_parts=num_parts),
        lambda: block_sparse_twin.block_sparse(*arguments),
    )


def _dense(
    bench: Bench,
    seqs_and_heads: tuple[int, int, int],
    num_tokens: int,
    num_keys: int,
    dim: int,
    *,
    causal: bool,
) -> Pair:
    num_seqs, num_kv_heads, group = seqs_and_heads
    q_NHTD = bench.normal(num_seqs, num_kv_heads * group, num_tokens, dim)
    k_NKLD, v_NKLD = (bench.normal(num_seqs, num_kv_heads, num_keys, dim) for _ in range(2))
    return (
        lambda: attention(q_NHTD, k_NKLD, v_NKLD, causal=causal),
        lambda: attention_twin(q_NHTD, k_NKLD, v_NKLD, causal=causal),
    )


def _paged_decode(
    bench: Bench, lengths: list[int], heads: int, group: int, size: int, dim: int
) -> Pair:
    lengths_N = np.array(lengths)
    starts = np.append(0, np.cumsum(-(-lengths_N // size)))
    total = int(starts[-1])
    pages = np.random.default_rng(total).permutation(total + 5)[:total]
    q_NHD = bench.normal(len(lengths), heads * group, dim)
    k_KPBD, v_KPBD = (bench.normal(heads, total + 5, size, dim) for _ in range(2))
    unused = np.setdiff1d(np.arange(total + 5), pages)
    k_KPBD[:, unused] = v_KPBD[:, unused] = torch.nan
    last = starts[1:][lengths_N > 0] - 1  # pages that keys may end in
    for page, length in zip(pages[last], lengths_N[lengths_N > 0], strict=True):
        k_KPBD[:, page, (length - 1) % size + 1 :] = torch.nan
        v_KPBD[:, page, (length - 1) % size + 1 :] = torch.nan
    processors = 1
    if bench.device.type == "cuda":
        processors = torch.cuda.get_device_properties(bench.device).multi_processor_count
    plan = paged_decode.plan_decode(
        starts, pages, lengths_N, page_size=size, num_kv_heads=heads,
        num_processors=processors, device=bench.device,
    )  # fmt: skip

    def run() -> tuple[Tensor, Tensor]:
        o_NHD = torch.full_like(q_NHD, torch.nan)
        lse_NH = torch.full(q_NHD.shape[:2], torch.nan, device=bench.device)
        paged_decode.paged_decode(q_NHD, k_KPBD, v_KPBD, plan, o_NHD, lse_NH)
        return o_NHD, lse_NH

    arguments = q_NHD, k_KPBD, v_KPBD, starts, pages, lengths_N
    return run, lambda: paged_decode_twin.paged_decode(*arguments)


def _score(bench: Bench, heads: int, blocks: int, chosen: int, size: int, dim: int) -> Pair:
    """Tiles of the second half of a sequence, and two probes of each."""
    device, num_probes = bench.device, 2
    tiles_N = torch.arange(blocks // 2, blocks, device=device)
    blocks_J = torch.arange(blocks, device=device)
    shape = heads, len(tiles_N), chosen + num_probes
    rows_KNRD = bench.normal(*shape, dim)
    scale_KNR = torch.rand(shape, generator=bench.generator, device=device) + 0.5
    scale_KNR *= dim**-0.5
    offsets = torch.randint(size, shape, generator=bench.generator, device=device)
    positions_KNR = tiles_N[:, None] * size + offsets
    k_PBD = bench.normal(heads * blocks, size, dim)
    order = torch.randperm(heads * blocks, generator=bench.generator, device=device)
    arguments = rows_KNRD, scale_KNR, positions_KNR, tiles_N, k_PBD, order.view(heads, -1), blocks_J
    seen_N = score.seen_blocks(tiles_N, blocks_J)

    def parts(module: Any) -> tuple[Tensor, ...]:
        block_lse_KJX, lse_KNR = module.score_blocks(*arguments)
        masses = module.block_masses(block_lse_KJX, lse_KNR, seen_N, chosen)
        return lse_KNR, *masses

    return lambda: parts(score), lambda: parts(score_twin)


def _choose(bench: Bench, heads: int, blocks: int) -> Pair:
    """Every third tile; of the masses few are large, and many are equal."""
    tiles_N = torch.arange(0, blocks, 3, device=bench.device)
    mass_KNJ = torch.rand(
        heads, len(tiles_N), blocks, generator=bench.generator, device=bench.device
    )
    mass_KNJ = (mass_KNJ**12 * 64).round() + 1.0
    mass_KNJ *= torch.arange(blocks, device=bench.device) <= tiles_N[:, None]
    mass_KNJ = (mass_KNJ / mass_KNJ.sum(2, keepdim=True)).half()
    return (
        lambda: (choose(mass_KNJ, tiles_N, GAMMA, WINDOW_BLOCKS),),
        lambda: (choose_twin(mass_KNJ, tiles_N, GAMMA, WINDOW_BLOCKS),),
    )
