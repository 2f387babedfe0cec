"""Paged decode attention against its twin: rows of any length, pages of any size, any split."""

import numpy as np
import pytest
import torch
from torch import Tensor

from csps.attention.backends import triton_decode
from csps.attention.backends.torch_cpu import TorchCpu
from csps.attention.merge import packed_row_bytes, unpack
from csps.attention.runs import RowByRow
from csps.attention.shards import Run
from csps.engine.kv_pool import KVPool
from csps_kernels.paged_decode import (
    MIN_KEYS,
    PROGRAMS_PER_PROCESSOR,
    TURNS,
    DecodePlan,
    max_chunks,
    paged_decode,
    plan_bytes,
    plan_decode,
)
from csps_kernels.twins.paged_decode import paged_decode as twin
from tests.kernels.close import assert_like_twin

SPLIT = 2 * MIN_KEYS + 37  # keys that are at least two chunks


class Case:
    """Random queries over pages in random order. Slots of no key are NaN: nobody may read them.

    Rows of q lie apart, and KV heads.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        lengths: list[int],
        num_kv_heads: int = 2,
        group: int = 3,
        dim: int = 64,
        page_size: int = 16,
    ) -> None:
        seed = sum(lengths) + 7 * num_kv_heads + 11 * group + dim + page_size
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        self.lengths = np.array(lengths, dtype=np.int64)
        num_pages = -(-self.lengths // page_size)
        self.starts = np.concatenate(([0], np.cumsum(num_pages)))
        total = self.starts[-1]
        self.pages = np.random.default_rng(seed).permutation(total + 5)[:total]
        num_heads = num_kv_heads * group
        self.q = normal(len(lengths), num_heads + 2, dim)[:, :num_heads]
        shape = (num_kv_heads, total + 9, page_size, dim)
        self.k, self.v = (
            torch.full(shape, torch.nan, device=device, dtype=dtype)[:, : total + 5]
            for _ in range(2)
        )
        for row, length in enumerate(lengths):
            keys = np.arange(length)
            pages = self.pages[self.starts[row] + keys // page_size]
            for x in (self.k, self.v):
                x[:, pages, keys % page_size] = normal(num_kv_heads, length, dim)

    def plan(self, num_processors: int) -> DecodePlan:
        return plan_decode(
            self.starts,
            self.pages,
            self.lengths,
            page_size=self.k.shape[2],
            num_kv_heads=self.k.shape[0],
            num_processors=num_processors,
            device=self.q.device,
        )


def check(case: Case, num_processors: int = 1) -> None:
    o, lse = torch.empty(case.q.shape).to(case.q), torch.empty(case.q.shape[:2]).to(case.q.device)
    paged_decode(case.q, case.k, case.v, case.plan(num_processors), o, lse)
    expected = twin(case.q, case.k, case.v, case.starts, case.pages, case.lengths)
    assert_like_twin((o, lse), expected, case.q.dtype)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_groups_and_head_dims(device, dtype, group: int, dim: int) -> None:
    check(Case(device, dtype, lengths=[70, 0, 1], group=group, dim=dim))


@pytest.mark.parametrize("page_size", [1, 4, 24, 64, 128])
def test_page_sizes(device, dtype, page_size: int) -> None:
    """Steps of the kernel are parts of a page, or cross pages."""
    check(Case(device, dtype, lengths=[150, 64, 3], page_size=page_size, group=2))


@pytest.mark.parametrize("num_processors", [1, 100])
def test_rows_are_split(device, dtype, num_processors: int) -> None:
    """Into chunks that end inside a page, beside rows that are one chunk or none."""
    case = Case(device, dtype, lengths=[SPLIT, 5, 0, SPLIT + 600], page_size=64)
    assert len(case.plan(num_processors).chunks) > 4
    check(case, num_processors)


def test_many_heads(device, dtype) -> None:
    check(Case(device, dtype, lengths=[33, 16], num_kv_heads=5, group=1, page_size=32))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_keys(device, dtype, lengths: list[int]) -> None:
    check(Case(device, dtype, lengths=lengths))


def test_packed_output(device, dtype) -> None:
    """o and lse of a row may be parts of one message, and nothing else of it is written."""
    case = Case(device, dtype, lengths=[40, 0, 9])
    num_rows, num_heads, dim = case.q.shape
    row_bytes = packed_row_bytes(num_heads, dim, case.q.element_size())
    buffer = torch.full((num_rows, row_bytes + 8), 255, dtype=torch.uint8, device=device)
    o, lse = unpack(buffer[:, :row_bytes], num_heads, dim, dtype)
    paged_decode(case.q, case.k, case.v, case.plan(1), o, lse)
    expected = twin(case.q, case.k, case.v, case.starts, case.pages, case.lengths)
    assert_like_twin((o, lse), expected, dtype)
    assert (buffer[:, row_bytes:] == 255).all()


@pytest.mark.parametrize("lengths", [[131072] * 8, [0, 1, 100_000, 5, 64, 4096, 700], [300]])
def test_chunks_cover_each_key_once(lengths: list[int]) -> None:
    page_size, num_kv_heads, num_processors = 64, 8, 132
    lengths_N = np.array(lengths)
    starts = np.concatenate(([0], np.cumsum(-(-lengths_N // page_size))))
    plan = plan_decode(
        starts,
        np.arange(starts[-1]),
        lengths_N,
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        num_processors=num_processors,
        device=torch.device("cpu"),
    )
    chunks, first_chunks, parts = (x.numpy() for x in (plan.chunks, *plan.parts))
    assert sorted(parts) == list(range(len(chunks)))
    programs = num_processors * PROGRAMS_PER_PROCESSOR * TURNS
    target = max(sum(lengths) * num_kv_heads // programs, MIN_KEYS)
    assert len(chunks) <= sum(lengths) / target + len(lengths)
    for row, length in enumerate(lengths):
        at = 0
        for chunk in parts[first_chunks[row] : first_chunks[row + 1]]:
            of_row, place, num_keys = chunks[chunk]
            assert (of_row, place) == (row, starts[row] + at // page_size)
            assert at % page_size == 0
            assert 0 < num_keys <= 1.5 * target + 2 * page_size
            at += num_keys
        assert at == length
    assert (np.diff(chunks[:, 2]) <= 0).all(), "long chunks go first"


def test_no_more_chunks_than_there_is_room_for() -> None:
    draw = np.random.default_rng(0)
    for _ in range(300):
        num_rows, num_kv_heads, num_processors = (int(draw.integers(1, x)) for x in (65, 9, 133))
        page_size = int(draw.choice([1, 16, 64, 256]))
        lengths = (2 ** draw.uniform(0, 17, num_rows)).astype(np.int64) - 1
        starts = np.concatenate(([0], np.cumsum(-(-lengths // page_size))))
        plan = plan_decode(
            starts,
            np.zeros(starts[-1], np.int64),
            lengths,
            page_size=page_size,
            num_kv_heads=num_kv_heads,
            num_processors=num_processors,
            device=torch.device("cpu"),
        )
        assert len(plan.chunks) <= max_chunks(num_rows, num_kv_heads, num_processors)
        taken = plan.chunks.untyped_storage().nbytes()
        assert taken <= plan_bytes(num_rows, starts[-1], num_kv_heads, num_processors)


def test_equal_to_torch_on_a_store(device) -> None:
    """The backend's rows over runs of a pool, in every layer, as the CPU's loop has them."""
    cpu = torch.device("cpu")
    pool, host = (
        KVPool(
            num_layers=3,
            num_pages=12,
            block_size=8,
            num_kv_heads=2,
            head_dim=32,
            staging_blocks=3,
            dtype=torch.float32,
            device=place,
        )
        for place in (device, cpu)
    )
    generator = torch.Generator().manual_seed(1)
    for flat, copy in ((host.flat_keys, pool.flat_keys), (host.flat_values, pool.flat_values)):
        flat.normal_(generator=generator)
        copy.copy_(flat)
    shards = [(Run(16, 8), Run(40, 24), Run(0, 3)), (), (Run(72, 1),), (Run(64, 16),)]
    attend = triton_decode.PagedDecode()(pool, shards)
    attend_host = RowByRow(TorchCpu(upcast=False))(host, shards)
    for layer in range(3):
        q = torch.randn(len(shards), 4, 32, generator=generator)
        found, expected = (
            (torch.empty(q.shape, device=place), torch.empty(q.shape[:2], device=place))
            for place in (device, cpu)
        )
        attend(layer, q.to(device), *found)
        attend_host(layer, q, *expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)
