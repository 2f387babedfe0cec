"""The kernel of each phase on random tokens: whether it is right here, and how long it takes.

Suffixes: T tokens, H query heads, K KV heads, G query heads of a KV head, R rows of an item, D
head dim, I items (a tile of a KV head), N tiles or rows of a decode step, E probes, B tokens of a
page, J blocks, M partial outputs or heads of messages, W heads of one rank's message.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csps.attention.backends import (
    BlockSparse,
    Choose,
    DecodeRows,
    Diagonal,
    FixedDecode,
    Kernels,
    Merge,
    Messages,
    PagedDecode,
    PageLists,
    Partial,
    Rotate,
    Score,
)
from csps.attention.backends.torch_cpu import cpu_kernels
from csps.attention.int8 import quantize
from csps.attention.kv import KVSlots, KVStore
from csps.attention.merge import pack, packed_row_bytes, unpack
from csps.attention.score import BlockKeys
from csps.attention.select import Rows
from csps.attention.shards import Run
from csps.core.heads import AxisHeads, all_heads
from csps.worker.trial_inputs import Inputs

# Of bf16 against fp32, on normal inputs.
TOLERANCE = 3e-2
REPEATS = 5
# A kernel that has taken this long has been timed well enough.
ENOUGH_S = 0.05
# Rows of a tile and head that choose pages, and as many probes.
SAMPLED_ROWS = 8
# What is asked for, and the second try (csps.attention.recall).
CHOSEN_GAMMAS = (0.95, 0.9875)
# Ranks that answer for a row of a decode step.
NUM_SOURCES = 3

Call = Callable[[], list[Tensor]]


# Each prepares what a step prepares once, and returns what a layer calls: the phase's outputs.


def _rotate(kernel: Rotate, inputs: Inputs) -> Call:
    """A whole prompt; its keys and values go to a pool of their own, the last token's first."""
    num_tokens, device = inputs.size.num_tokens, inputs.q_TKGD.device
    k_TKD, v_TKD = inputs.store.view(0, Run(0, num_tokens))
    qk_TKGD = torch.cat((inputs.q_TKGD[:num_tokens], k_TKD.unsqueeze(2)), dim=2)
    frequencies = torch.logspace(0, -3, k_TKD.shape[2] // 2)
    angles = torch.outer(torch.arange(num_tokens).float(), frequencies)
    table_PD = torch.cat((angles.cos(), angles.sin()), dim=1).to(device)
    positions_T = torch.arange(num_tokens, device=device)
    store = inputs.empty_store()
    rotate = kernel(table_PD, positions_T, KVSlots(store, positions_T.flip(0)))

    def call() -> list[Tensor]:
        stored = store.view(0, Run(0, num_tokens))
        return [*rotate(0, qk_TKGD, v_TKD), *stored]

    return call


def _partial(kernel: Partial, inputs: Inputs) -> Call:
    """A whole prompt, then its last token again: many rows and few may take different ways."""
    num_tokens = inputs.size.num_tokens
    q_THD = inputs.queries()[:num_tokens]
    k_TKD, v_TKD = inputs.store.view(0, Run(0, num_tokens))

    def call() -> list[Tensor]:
        whole = kernel(q_THD, k_TKD, v_TKD, causal=True)
        return [*whole, *kernel(q_THD[-1:], k_TKD, v_TKD, causal=False)]

    return call


def _block_sparse(kernel: BlockSparse, inputs: Inputs) -> Call:
    """Pages drawn from all of the item's head; the first item has none."""
    q_IRD = inputs.tiles().flatten(1, 2)
    rng, per_item = np.random.default_rng(0), inputs.size.pages_per_tile
    items_of_head = inputs.size.num_tiles
    drawn = [
        inputs.store.flat_pages(0, item // items_of_head, rng.permutation(inputs.num_pages))
        for item in range(1, len(q_IRD))
    ]
    pages = np.concatenate([x[:per_item] for x in drawn]) if drawn else np.empty(0)
    starts = np.append(0, np.arange(len(q_IRD)) * per_item)
    lists = PageLists(
        *(torch.from_numpy(x.astype(np.int32)).to(q_IRD.device) for x in (starts, pages)),
        longest=per_item,
    )
    store = inputs.store
    return lambda: list(kernel(q_IRD, store.flat_keys, store.flat_values, lists))


def _diagonal(kernel: Diagonal, inputs: Inputs) -> Call:
    q_IGBD = inputs.tiles()
    pages = torch.from_numpy(inputs.tile_pages().flatten()).to(q_IGBD.device)
    k_IBD, v_IBD = inputs.store.flat_keys[pages], inputs.store.flat_values[pages]
    return lambda: list(kernel(q_IGBD, k_IBD, v_IBD))


def _score(kernel: Score, inputs: Inputs) -> Call:
    """Probes alone are compared: rows that choose may have a fast exponential."""
    num_tiles, num_kv_heads = inputs.size.num_tiles, inputs.q_TKGD.shape[1]
    device = inputs.q_TKGD.device
    tiles = torch.arange(num_tiles, device=device)
    offsets = torch.linspace(0, inputs.page_size - 1, 2 * SAMPLED_ROWS, device=device).long()
    positions_NR = tiles[:, None] * inputs.page_size + offsets
    positions_KNR = positions_NR.expand(num_kv_heads, -1, -1).contiguous()
    q_KNGBD = inputs.tiles().unflatten(0, (num_kv_heads, num_tiles))
    sampled_KNRD = q_KNGBD[:, :, 0, offsets]
    chosen, probes = sampled_KNRD.split(SAMPLED_ROWS, dim=2)
    rows = Rows(*quantize(chosen), probes)
    keys_pages = torch.from_numpy(inputs.tile_pages()).to(device)

    def call() -> list[Tensor]:
        keys = BlockKeys(inputs.store.flat_keys, keys_pages)
        scores = kernel(rows, positions_KNR, tiles, keys, tiles)
        _, probe_masses = scores.masses(scores.lse, SAMPLED_ROWS)
        return [scores.lse[:, :, SAMPLED_ROWS:], probe_masses]

    return call


def _choose(kernel: Choose, inputs: Inputs) -> Call:
    """Masses of which a few are large."""
    num_tiles, num_kv_heads = inputs.size.num_tiles, inputs.q_TKGD.shape[1]
    device = inputs.q_TKGD.device
    generator = torch.Generator().manual_seed(0)
    mass_KNJ = torch.rand(num_kv_heads, num_tiles, num_tiles, generator=generator).pow_(8).tril_()
    mass_KNJ = (mass_KNJ / mass_KNJ.sum(2, keepdim=True)).half().to(device)
    tiles = torch.arange(num_tiles, device=device)
    return lambda: [keep.float() for keep in kernel(mass_KNJ, tiles, CHOSEN_GAMMAS)]


def _paged_decode(kernel: PagedDecode, inputs: Inputs) -> Call:
    """Shards of two runs, the last page of which is half full; the last row has no keys."""
    size, page_size = inputs.size, inputs.page_size
    first = size.pages_per_row // 2
    shards: list[tuple[Run, ...]] = []
    for row in range(size.num_rows - 1):
        page = row * size.pages_per_row
        runs = (page + first, size.pages_per_row - first), (page, first)
        in_slots = [Run(at * page_size, num * page_size) for at, num in runs if num]
        *whole, last = in_slots
        shards.append((*whole, last._replace(num_tokens=last.num_tokens - page_size // 2)))
    rows = kernel(inputs.store, [*shards, ()])
    q_NHD = inputs.queries()[: size.num_rows]
    o_NHD = torch.full_like(q_NHD, torch.nan)
    lse_NH = q_NHD.new_full(q_NHD.shape[:2], torch.nan, dtype=torch.float32)

    def call() -> list[Tensor]:
        rows(0, q_NHD, o_NHD, lse_NH)
        return [o_NHD, lse_NH]

    return call


def _merge(kernel: Merge, inputs: Inputs) -> Call:
    """Sources have all rows but one, each another."""
    num_rows = inputs.size.num_rows
    by_source = [np.delete(np.arange(num_rows), source % num_rows) for source in range(NUM_SOURCES)]
    num_partials = sum(map(len, by_source))
    o_THD = inputs.queries()
    picked = torch.arange(num_partials, device=o_THD.device) % len(o_THD)
    message_MB = pack(o_THD[picked], o_THD[picked, :, 0].float())
    own_THD = o_THD[:num_rows].float()
    out_THD = torch.full_like(o_THD[:num_rows], torch.nan)
    merge = kernel(by_source, num_rows, o_THD.device)

    def call() -> list[Tensor]:
        merge(message_MB, out_THD, (own_THD.clone(), own_THD[..., 1].clone()))
        return [out_THD]

    return call


def _messages(kernel: Messages, inputs: Inputs) -> Call:
    """One of two ranks in a decode step: what it packs, and what it makes of such messages."""
    num_rows = inputs.size.num_rows
    q_THD = inputs.queries()[:num_rows]
    # Distinct, and as strided as v of the projections.
    k_TKD, v_TKD = (inputs.q_TKGD[:num_rows, :, 0] * factor for factor in (2.0, 3.0))
    resident = all_heads(q_THD.shape[1], k_TKD.shape[1])
    heads = AxisHeads(resident, tuple(resident.split(2)))
    own, other = heads.parts
    messages = kernel(heads, 0, q_THD.device)
    head_dim = q_THD.shape[2]
    own_TWD = q_THD.new_empty(num_rows, own.num_qkv_heads, head_dim)
    lse_NH = q_THD[..., 0].float().contiguous()
    queries, keys = heads.queries(0), heads.keys(0)
    o_ThD = q_THD[:, queries].contiguous()
    own_rows = num_rows, packed_row_bytes(own.num_heads, head_dim, q_THD.element_size())
    own_NB = o_ThD.new_empty(own_rows, dtype=torch.uint8)
    others_MD = q_THD[:, heads.queries(1)].contiguous().view(-1, head_dim)

    def call() -> list[Tensor]:
        sent = messages.pack_qkv(q_THD, k_TKD, v_TKD, own_TWD)[1].view(-1, head_dim)
        all_TXD = messages.unpack_qkv(sent, own_TWD)
        to_all = messages.own_qkv(q_THD[:, queries], k_TKD[:, keys], v_TKD[:, keys])
        rows = messages.pack_partials(q_THD, lse_NH, own_NB)[1], own_NB
        partials = [
            x
            for packed, part in zip(rows, (other, own), strict=True)
            if part.num_heads
            for x in unpack(packed.view(num_rows, -1), part.num_heads, head_dim, q_THD.dtype)
        ]
        out_THD = messages.unpack_outputs(others_MD, o_ThD)
        return [own_TWD, sent, all_TXD, to_all, *partials, out_THD]

    return call


# By field of Kernels.
TRIALS: Mapping[str, Callable[[Any, Inputs], Call]] = {
    "rotate": _rotate,
    "partial": _partial,
    "block_sparse": _block_sparse,
    "diagonal": _diagonal,
    "score": _score,
    "choose": _choose,
    "paged_decode": _paged_decode,
    "merge": _merge,
    "messages": _messages,
}


def check(phase: str, kernels: Kernels, inputs: Inputs) -> None:
    """AssertionError if a phase's kernel is wrong on `inputs`; what it raises itself."""
    exact = cpu_kernels(upcast=False, num_threads=1)
    expected = TRIALS[phase](getattr(exact, phase), inputs.in_fp32())()
    tried = [getattr(kernels, phase)]
    if isinstance(kernels.paged_decode, FixedDecode) and phase == "paged_decode":
        tried.append(_in_fixed_place(kernels.paged_decode))
    for kernel in tried:
        for one, other in zip(TRIALS[phase](kernel, inputs)(), expected, strict=True):
            torch.testing.assert_close(one.float().cpu(), other, rtol=TOLERANCE, atol=TOLERANCE)


def _in_fixed_place(kernel: FixedDecode) -> PagedDecode:
    def paged_decode(store: KVStore, shards: Sequence[tuple[Run, ...]]) -> DecodeRows:
        rows = kernel.fixed(store, len(shards))
        rows.load(shards)
        return rows

    return paged_decode


def seconds(phase: str, kernels: Kernels, inputs: Inputs) -> float:
    """Median time of a layer's call, from when the device has nothing else to do."""
    call = TRIALS[phase](getattr(kernels, phase), inputs)
    call()  # what is compiled is compiled now
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < ENOUGH_S:
        times.append(_timed(call, inputs.q_TKGD.device))
    return statistics.median(times)


def _timed(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
