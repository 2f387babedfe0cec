"""FlashInfer's kernels, as the backend calls them, against torch in fp32. Only on GPUs.

What a step or a call must not read is NaN, and what it must write.
"""

import gc

import pytest
import torch
from torch import Tensor

from csps.attention.backends import PagedDecode
from csps.attention.backends.flashinfer import kernels
from csps.attention.backends.torch_cpu import TorchCpu
from csps.attention.merge import packed_row_bytes, unpack
from csps.attention.runs import RowByRow
from csps.attention.shards import Run
from csps.engine.kv_pool import KVPool
from tests.kernels.close import assert_like_twin

EXACT = TorchCpu(upcast=False)
HOST = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
PAGE_SIZE, NUM_PAGES, NUM_LAYERS = 16, 24, 2
# Runs of pages that are apart, a page that is partly filled, rows without keys, one key.
SHARDS = [(Run(16, 16), Run(64, 80), Run(0, 3)), (), (Run(160, 1),), (Run(176, 64),), ()]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pools(num_kv_heads: int, dim: int, dtype: torch.dtype, device) -> tuple[KVPool, KVPool]:
    """(one of `dtype` on `device`, the same numbers on the CPU in fp32)."""
    pool, host = (
        KVPool(
            num_layers=NUM_LAYERS,
            num_pages=NUM_PAGES,
            block_size=PAGE_SIZE,
            num_kv_heads=num_kv_heads,
            head_dim=dim,
            staging_blocks=0,
            dtype=of,
            device=place,
        )
        for of, place in ((dtype, device), (torch.float32, HOST))
    )
    for seed, names in enumerate(("flat_keys", "flat_values")):
        x = getattr(pool, names)
        x.copy_(normal(*x.shape, seed=seed))
        getattr(host, names).copy_(x)
    return pool, host


def check_step(
    paged_decode: PagedDecode, shards: list, group: int, dim: int, dtype: torch.dtype, device
) -> None:
    """All layers; rows of q lie apart, and those of (o, lse), which are parts of messages."""
    num_kv_heads = 2
    pool, host = pools(num_kv_heads, dim, dtype, device)
    attend = paged_decode(pool, shards)
    exact = RowByRow(EXACT)(host, shards)
    num_heads = num_kv_heads * group
    for layer in range(NUM_LAYERS):
        q = normal(len(shards), num_heads + 1, dim, seed=layer).to(device, dtype)[:, :num_heads]
        row_bytes = packed_row_bytes(num_heads, dim, q.element_size())
        message = torch.full((len(shards), row_bytes + 16), 255, dtype=torch.uint8, device=device)
        found = unpack(message[:, :row_bytes], num_heads, dim, dtype)
        attend(layer, q, *found)
        expected = torch.empty(q.shape), torch.empty(q.shape[:2])
        exact(layer, q.float().cpu(), *expected)
        assert_like_twin((found[0].cpu(), found[1].cpu()), expected, dtype)
        assert (message[:, row_bytes:] == 255).all()


@DTYPES
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
def test_decode(device, dtype: torch.dtype, group: int, dim: int) -> None:
    check_step(kernels(group).paged_decode, SHARDS, group, dim, dtype, device)


@pytest.mark.parametrize("shards", [[], [()], SHARDS[2:4], [SHARDS[0]] * 70])
def test_decode_of_other_batches(device, shards: list) -> None:
    """None, nothing to see, all rows see something, more than the GPU runs at a time."""
    check_step(kernels(4).paged_decode, shards, 4, 128, torch.bfloat16, device)


@pytest.mark.parametrize("group", [3, 4])
def test_fp32_output_in_place(device, group: int) -> None:
    """As the master of a step's rows has it; and its own dtype, contiguous."""
    pool, host = pools(2, 64, torch.bfloat16, device)
    shards = SHARDS[2:4]
    attend = kernels(group).paged_decode(pool, shards)
    q = normal(2, 2 * group, 64, seed=5).to(device, torch.bfloat16)
    expected = torch.empty(q.shape), torch.empty(q.shape[:2])
    RowByRow(EXACT)(host, shards)(1, q.float().cpu(), *expected)
    for dtype in (torch.float32, torch.bfloat16):
        o, lse = torch.empty(q.shape, dtype=dtype, device=device), torch.empty(q.shape[:2])
        lse = lse.to(device)
        attend(1, q, o, lse)
        assert o.dtype == dtype
        found = o.to(torch.bfloat16).cpu(), lse.cpu()
        assert_like_twin(found, expected, torch.bfloat16)


def test_steps_have_plans_of_their_own(device) -> None:
    """Two are under way at a time, then later ones take over what they leave."""
    paged_decode = kernels(4).paged_decode
    pool, host = pools(2, 64, torch.bfloat16, device)
    for first in range(4):
        shards = [[SHARDS[0], SHARDS[3]], [SHARDS[3], SHARDS[2], SHARDS[first]]]
        steps = [paged_decode(pool, step) for step in shards]
        for layer in range(NUM_LAYERS):
            for step, attend in zip(shards, steps, strict=True):
                q = normal(len(step), 8, 64, seed=first).to(device, torch.bfloat16)
                found = torch.empty_like(q), torch.empty(q.shape[:2], device=device)
                attend(layer, q, *found)
                expected = torch.empty(q.shape), torch.empty(q.shape[:2])
                RowByRow(EXACT)(host, step)(layer, q.float().cpu(), *expected)
                assert_like_twin(tuple(x.cpu() for x in found), expected, torch.bfloat16)
        del steps, attend
        gc.collect()


@pytest.mark.parametrize("group", [3, 4])
def test_decode_in_a_graph(device, group: int) -> None:
    """Captured once, then run for other rows, fewer of them too."""
    pool, host = pools(2, 128, torch.bfloat16, device)
    rows = kernels(group).paged_decode.fixed(pool, len(SHARDS))
    q = normal(len(SHARDS), 2 * group, 128, seed=3).to(device, torch.bfloat16)
    found = torch.empty_like(q), torch.empty(q.shape[:2], device=device)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        rows(1, q, *found)
    with torch.cuda.graph(graph, stream=stream):
        rows(1, q, *found)
    for shards in (SHARDS, SHARDS[2:], [], SHARDS[:1], SHARDS[::-1]):
        rows.load(shards)
        for x in found:
            x.fill_(torch.nan)
        graph.replay()
        all_shards = [*shards, *[()] * (len(SHARDS) - len(shards))]
        expected = torch.empty(q.shape), torch.empty(q.shape[:2])
        RowByRow(EXACT)(host, all_shards)(1, q.float().cpu(), *expected)
        assert_like_twin((found[0].cpu(), found[1].cpu()), expected, torch.bfloat16)


@DTYPES
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("num_tokens", "num_keys", "group", "causal"),
    [
        (1, 1, 1, True),
        (1, 300, 8, False),
        (65, 65, 3, True),
        (70, 130, 4, False),
        (1153, 1153, 4, True),  # these fill a GPU
        (1200, 333, 8, False),
    ],
)
def test_dense(
    device, dtype: torch.dtype, dim: int, num_tokens: int, num_keys: int, group: int, causal: bool
) -> None:
    """Keys are views of a pool: head by head, with NaN before and behind."""
    num_kv_heads = 4
    wide = normal(num_tokens, num_kv_heads * group + 2, dim, seed=1).to(device, dtype)
    q = wide[:, : num_kv_heads * group]
    shape = (2, num_kv_heads, num_keys + 9, dim)
    shard = torch.full(shape, torch.nan, dtype=dtype, device=device)[:, :, 5:-4]
    shard.copy_(normal(*shard.shape, seed=2))
    k, v = shard.transpose(1, 2)
    found = kernels(group).partial(q, k, v, causal=causal)
    expected = EXACT(*(x.float().cpu() for x in (q, k, v)), causal=causal)
    assert_like_twin((found[0].cpu(), found[1].cpu()), expected, dtype)
