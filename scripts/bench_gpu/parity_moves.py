"""Parity cases of the kernels that move data: merge, rotary embedding and store, messages.

Suffixes: T rows or tokens, M partials, H query heads, K KV heads, G query heads of a KV head, D
head dim, S slots.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csps_kernels import merge, pack, rope_store
from csps_kernels.twins import merge as merge_twin
from csps_kernels.twins import pack as pack_twin
from csps_kernels.twins import rope_store as rope_store_twin
from scripts.bench_gpu.bench import Bench
from scripts.bench_gpu.parity_attention import Case, Pair


def checks(bench: Bench) -> Iterator[Case]:
    """As parity_attention.checks."""
    model = bench.sizes.model
    heads, dim = model.num_heads, model.head_dim
    tokens = min(bench.sizes.tokens, 300)

    def case(kernel: Callable[..., Pair], name: str, *arguments: int) -> Case:
        label = f"{kernel.__name__.strip('_')}: {name}"
        return label, functools.partial(kernel, bench, *arguments)

    yield case(_merge, "model", tokens, heads, dim)
    yield case(_merge, "odd", 3, 9, 64)
    yield case(_rope_store, "model", tokens, model.num_kv_heads, model.group_size, dim)
    yield case(_rope_store, "odd", 7, 3, 3, 64)
    yield case(_pack_partials, "model", tokens, heads, dim)
    yield case(_pack_partials, "odd", 5, 9, 64)
    yield case(_pack_heads, "model", tokens, model.num_heads, model.num_kv_heads, dim)
    yield case(_pack_heads, "odd", 5, 9, 3, 64)


def _merge(bench: Bench, num_rows: int, heads: int, dim: int) -> Pair:
    """Sources that answer for some rows each, and for one row nobody."""
    rows_by_source = [np.arange(0, num_rows - 1), np.arange(0, num_rows - 1, 3), np.empty(0, int)]
    count = sum(map(len, rows_by_source))
    o_MHD, lse_MH = bench.normal(count, heads, dim), bench.normal(count, heads, dtype=torch.float32)
    lse_MH[::5] = -torch.inf
    plan = merge.plan_merge(rows_by_source, num_rows, bench.device)

    def run() -> tuple[Tensor, Tensor]:
        out_THD = torch.full((num_rows, heads, dim), torch.nan, device=bench.device).to(bench.dtype)
        out_lse_TH = torch.full((num_rows, heads), torch.nan, device=bench.device)
        merge.merge(o_MHD, lse_MH, plan, out_THD, out_lse_TH)
        return out_THD, out_lse_TH

    twin = merge_twin.merge
    return run, lambda: twin(o_MHD, lse_MH, rows_by_source, num_rows)


def _rope_store(bench: Bench, tokens: int, kv_heads: int, group: int, dim: int) -> Pair:
    num_slots, device = tokens + 9, bench.device
    fused = bench.normal(tokens, kv_heads, group + 2, dim)
    angles = torch.rand(tokens + 3, dim // 2, generator=bench.generator, device=device) * 6.0
    table_PD = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions_T = torch.randint(tokens + 3, (tokens,), generator=bench.generator, device=device)
    slots_T = torch.randperm(num_slots, generator=bench.generator, device=device)[:tokens]
    slots_T[::4] = -1

    def run(module: Any) -> tuple[Tensor, ...]:
        shape = kv_heads, num_slots, dim
        keys, values = (torch.zeros(shape, device=device, dtype=bench.dtype) for _ in range(2))
        arguments = fused[:, :, : group + 1], fused[:, :, group + 1], table_PD
        places = rope_store.Places(slots_T, keys, values)
        return *module.rope_store(*arguments, positions_T, places), keys, values

    return lambda: run(rope_store), lambda: run(rope_store_twin)


def _pack_partials(bench: Bench, rows: int, heads: int, dim: int) -> Pair:
    """Three peers, one of which has no head; the first ones' rows are own."""
    o_THD = bench.normal(rows, heads, dim)
    lse_TH = bench.normal(rows, heads, dtype=torch.float32)
    num_own = heads // 2
    by_peer = [range(num_own), range(0), range(num_own, heads)]
    columns = pack.head_columns(by_peer, 0, bench.device)
    row_bytes = num_own * (dim * bench.dtype.itemsize + 4)

    def run(module: Any) -> tuple[Tensor, ...]:
        own = torch.zeros(rows, row_bytes, device=bench.device, dtype=torch.uint8)
        return module.pack_partials(o_THD, lse_TH, columns, own), own

    return lambda: run(pack), lambda: run(pack_twin)


def _pack_heads(bench: Bench, tokens: int, heads: int, kv_heads: int, dim: int) -> Pair:
    """Two peers with half the heads each, of q, k and v; there and back again."""
    total = heads + 2 * kv_heads
    counts = heads, kv_heads, kv_heads
    q_THD, k_TKD, v_TKD = (bench.normal(tokens, count, dim) for count in counts)
    by_peer = [range(total // 2), range(total // 2, total)]
    columns = pack.head_columns(by_peer, 1, bench.device)

    def run(module: Any) -> tuple[Tensor, ...]:
        own = q_THD.new_zeros(tokens, columns.num_own, dim)
        message = module.pack_heads(q_THD, k_TKD, v_TKD, columns, own)
        out = q_THD.new_zeros(tokens, total, dim)
        module.unpack_heads(message, columns, own, out)
        return message, own, out

    return lambda: run(pack), lambda: run(pack_twin)
