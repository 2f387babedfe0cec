"""Block-sparse paged attention against its twin: lists of any length, odd rows, every page size."""

import numpy as np
import pytest
import torch
from torch import Tensor

from csps_kernels.block_sparse import block_sparse
from csps_kernels.twins.block_sparse import block_sparse as twin
from tests.kernels.close import assert_like_twin

NUM_PAGES = 40


class Case:
    """Random queries, pages and lists. Pages in no list are NaN: nobody may read them."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        lengths: list[int],
        num_rows: int,
        page_size: int = 16,
        dim: int = 64,
    ) -> None:
        seed = sum(lengths) + num_rows + page_size + dim
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        self.q = normal(len(lengths), num_rows, dim)
        self.k = normal(NUM_PAGES, page_size, dim)
        self.v = normal(NUM_PAGES, page_size, dim)
        # Every second page is in no list.
        draw = np.random.default_rng(seed)
        lists = [draw.permutation(NUM_PAGES // 2)[:length] * 2 for length in lengths]
        starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        pages = np.concatenate([np.empty(0, np.int64), *lists])
        self.starts, self.pages = (torch.from_numpy(x).int().to(device) for x in (starts, pages))
        self.longest = max(lengths, default=0)
        self.k[1::2] = self.v[1::2] = torch.nan

    @property
    def arguments(self) -> tuple:
        return self.q, self.k, self.v, self.starts, self.pages, self.longest


def check(case: Case, **options: int) -> None:
    assert_like_twin(block_sparse(*case.arguments, **options), twin(*case.arguments), case.q.dtype)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_tiles_of_a_group(device, dtype, group: int) -> None:
    """Rows are a tile's tokens for each head of the group."""
    check(Case(device, dtype, lengths=[3, 0, 1], num_rows=group * 16))


@pytest.mark.parametrize("num_rows", [1, 5, 65, 130, 192])
def test_rows_that_fill_no_tile(device, dtype, num_rows: int) -> None:
    check(Case(device, dtype, lengths=[2, 1], num_rows=num_rows))


@pytest.mark.parametrize("dim", [16, 32, 64, 128])
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_page_sizes_and_head_dims(device, dtype, page_size: int, dim: int) -> None:
    check(Case(device, dtype, lengths=[1, 2], num_rows=32, page_size=page_size, dim=dim))


@pytest.mark.parametrize("num_parts", [2, 3, 8])
def test_lists_in_parts(device, dtype, num_parts: int) -> None:
    """Lists shorter than the number of parts too, and empty ones."""
    check(Case(device, dtype, lengths=[7, 0, 1, 20], num_rows=33), num_parts=num_parts)


def test_large_scores(device, dtype) -> None:
    """Exponents that would overflow without the running maximum, growing along the list."""
    case = Case(device, dtype, lengths=[6], num_rows=16)
    case.k[case.pages] *= torch.arange(1, 7, device=device, dtype=dtype)[:, None, None] * 10
    o, lse = block_sparse(*case.arguments)
    twin_o, twin_lse = twin(*case.arguments)
    assert twin_lse.max() > 100
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(o.float(), twin_o, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, twin_lse, rtol=1e-3, atol=1e-2)


def test_no_pages_at_all(device, dtype) -> None:
    case = Case(device, dtype, lengths=[0, 0], num_rows=8)
    o, lse = block_sparse(*case.arguments)
    assert (o == 0).all()
    assert (lse == -torch.inf).all()


def test_no_items(device, dtype) -> None:
    case = Case(device, dtype, lengths=[], num_rows=8)
    o, lse = block_sparse(*case.arguments)
    assert o.shape == (0, 8, 64)
    assert lse.shape == (0, 8)


def test_rows_that_lie_apart(device, dtype) -> None:
    case = Case(device, dtype, lengths=[1, 2], num_rows=20)
    expected = twin(*case.arguments)
    case.q = case.q.repeat_interleave(2, dim=1)[:, ::2]
    assert_like_twin(block_sparse(*case.arguments), expected, dtype)


@pytest.mark.parametrize(("page_size", "dim"), [(24, 64), (8, 64), (16, 96)])
def test_sizes_that_do_not_fit(device, page_size: int, dim: int) -> None:
    case = Case(device, torch.float32, lengths=[1], num_rows=8, page_size=page_size, dim=dim)
    with pytest.raises(ValueError, match="power of 2"):
        block_sparse(*case.arguments)
