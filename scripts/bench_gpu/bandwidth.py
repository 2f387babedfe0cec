"""Kernels that only move data, whose floor is each byte read once and written once.

Suffixes: T tokens, K KV heads, G query heads of a KV head, D head dim, S slots.
"""

import functools

import torch

from csps_kernels.pack import head_columns, pack_heads, pack_partials, unpack_heads
from csps_kernels.rope_store import Places, rope_store
from scripts.bench_gpu.bench import Bench, Row

NUM_PEERS = 4
DECODE_ROWS = 32


def run(bench: Bench) -> None:
    """A row of each, of as many tokens as a large prefill step has, and of a decode batch."""
    for tokens in sorted({bench.sizes.tokens, min(bench.sizes.tokens, DECODE_ROWS)}):
        bench.case(f"rope_store, {tokens} tokens", functools.partial(_rope, bench, tokens))
        _partials(bench, tokens)
        _heads(bench, tokens)


def _rope(bench: Bench, tokens: int) -> Row:
    model = bench.sizes.model
    kv_heads, group, dim = model.num_kv_heads, model.group_size, model.head_dim
    fused = bench.normal(tokens, kv_heads, group + 2, dim)
    table = bench.normal(tokens, dim, dtype=torch.float32)
    slots = torch.randperm(2 * tokens, generator=bench.generator, device=bench.device)[:tokens]
    positions = torch.arange(tokens, device=bench.device)
    keys, values = (bench.normal(kv_heads, 2 * tokens, dim) for _ in range(2))
    places = Places(slots, keys, values)
    timing = bench.timer(
        lambda: rope_store(
            fused[:, :, : group + 1], fused[:, :, group + 1], table, positions, places
        )
    )
    k_bytes = fused.nbytes // (group + 2)
    least = 2 * fused.nbytes + k_bytes + table.nbytes + slots.nbytes + positions.nbytes
    return bench.beside_floor(timing, 0.0, least)


def _partials(bench: Bench, tokens: int) -> None:
    model = bench.sizes.model
    o = bench.normal(tokens, model.num_heads, model.head_dim)
    lse = bench.normal(tokens, model.num_heads, dtype=torch.float32)
    columns = head_columns(_by_peer(model.num_heads), 0, bench.device)
    row_bytes = columns.num_own * (model.head_dim * bench.dtype.itemsize + 4)
    own = torch.empty(tokens, row_bytes, device=bench.device, dtype=torch.uint8)
    bench.timed(
        f"pack_partials, {tokens} rows",
        lambda: pack_partials(o, lse, columns, own),
        num_bytes=2 * (o.nbytes + lse.nbytes),
    )


def _heads(bench: Bench, tokens: int) -> None:
    model = bench.sizes.model
    counts = model.num_heads, model.num_kv_heads, model.num_kv_heads
    parts = [bench.normal(tokens, count, model.head_dim) for count in counts]
    columns = head_columns(_by_peer(sum(counts)), 0, bench.device)
    own = parts[0].new_empty(tokens, columns.num_own, model.head_dim)
    message = pack_heads(*parts, columns, own)
    out = own.new_empty(tokens, sum(counts), model.head_dim)
    bench.timed(
        f"pack_heads, {tokens} tokens",
        lambda: pack_heads(*parts, columns, own),
        num_bytes=2 * out.nbytes,
    )
    bench.timed(
        f"unpack_heads, {tokens} tokens",
        lambda: unpack_heads(message, columns, own, out),
        num_bytes=2 * out.nbytes,
    )


def _by_peer(num_heads: int) -> list[list[int]]:
    return [peer.tolist() for peer in torch.arange(num_heads).tensor_split(NUM_PEERS)]
