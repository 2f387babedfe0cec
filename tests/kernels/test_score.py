"""Scores of sampled rows: the Triton kernels against the matrix of all rows by all keys."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from csps_kernels import score
from csps_kernels.twins import score as twin

# Logarithms of no mass; NumPy, which interprets the kernels, says so.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")


class Case(NamedTuple):
    """What `score_blocks` takes."""

    rows: Tensor
    scale: Tensor
    positions: Tensor
    tiles: Tensor
    keys: Tensor
    pages: Tensor
    blocks: Tensor


def case(
    device: torch.device,
    dtype: torch.dtype,
    *,
    tiles: list[int],
    blocks: list[int],
    rows_per_tile: int,
    page_size: int = 16,
    dim: int = 64,
    num_kv_heads: int = 2,
) -> Case:
    """Pages in any order among others; keys behind every row, and other pages, are NaN."""
    generator = torch.Generator().manual_seed(len(tiles) * 1000 + rows_per_tile * 10 + dim)
    shape = (num_kv_heads, len(tiles), rows_per_tile)
    rows = torch.randint(-127, 128, (*shape, dim), generator=generator).to(dtype)
    scale = torch.rand(shape, generator=generator) * 0.05 / math.sqrt(dim) + 1e-4
    offsets = torch.randint(page_size, shape, generator=generator)
    positions = torch.tensor(tiles, dtype=torch.int64)[:, None] * page_size + offsets
    num_pages = num_kv_heads * len(blocks) + 3
    keys = torch.full((num_pages, page_size, dim), torch.nan, dtype=dtype)
    pages = torch.randperm(num_pages, generator=generator)[: num_kv_heads * len(blocks)]
    values = torch.randn(len(pages), page_size, dim, generator=generator)
    pages = pages.view(num_kv_heads, len(blocks))
    keys[pages.flatten()] = values.to(dtype)
    if len(blocks) and positions.numel() and blocks[-1] == tiles[-1]:
        written = positions[:, -1].amax(1) % page_size + 1
        for head, end in enumerate(written.tolist()):
            keys[pages[head, -1], end:] = torch.nan
    found = Case(
        rows, scale, positions, torch.tensor(tiles, dtype=torch.int64), keys, pages,
        torch.tensor(blocks, dtype=torch.int64),
    )  # fmt: skip
    return Case(*(tensor.to(device) for tensor in found))


def without_nan(case: Case) -> Case:
    """The twin multiplies keys that no row sees, too."""
    return case._replace(keys=case.keys.float().nan_to_num(), rows=case.rows.float())


def check(case: Case, num_chosen: int) -> None:
    block_lse, lse = score.score_blocks(*case)
    expected_block_lse, expected_lse = twin.score_blocks(*without_nan(case))
    assert block_lse.dtype == lse.dtype == torch.float32
    tolerance = {"rtol": 1e-4, "atol": 1e-3}  # of logarithms: 0.1% of the mass
    torch.testing.assert_close(lse, expected_lse, **tolerance)
    seen = score.seen_blocks(case.tiles, case.blocks)
    behind = torch.arange(len(case.blocks), device=seen.device)[:, None] >= seen
    behind = behind.repeat_interleave(case.rows.shape[2], dim=1)
    torch.testing.assert_close(
        block_lse.masked_fill(behind, 0.0), expected_block_lse.masked_fill(behind, 0.0), **tolerance
    )
    # Other ranks have keys as well: the total is more than what is here.
    total = torch.logaddexp(expected_lse, torch.full_like(expected_lse, 1.0))
    mean, probes = score.block_masses(block_lse, total, seen, num_chosen)
    expected_mean, expected_probes = twin.block_masses(expected_block_lse, total, seen, num_chosen)
    torch.testing.assert_close(mean, expected_mean, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(probes, expected_probes, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("dim", [64, 128])
def test_a_shard_with_gaps(device, dtype, dim) -> None:
    """Rows of one program are of several tiles; some see their own block, some none here."""
    blocks = [1, 2, 4, 7, 8]
    check(case(device, dtype, tiles=[0, 1, 3, 4, 8], blocks=blocks, rows_per_tile=5, dim=dim), 3)


@pytest.mark.parametrize("page_size", [32, 64, 128])
def test_sizes_of_pages(device, dtype, page_size) -> None:
    check(case(device, dtype, tiles=[2], blocks=[0, 2], rows_per_tile=3, page_size=page_size), 1)


@pytest.mark.parametrize("num_chosen", [0, 4])
def test_only_probes_or_none(device, dtype, num_chosen) -> None:
    check(case(device, dtype, tiles=[1, 2], blocks=[0, 1], rows_per_tile=4), num_chosen)


def test_more_rows_than_a_program_has(device, dtype) -> None:
    tiles = list(range(8))
    check(case(device, dtype, tiles=tiles, blocks=tiles, rows_per_tile=18, num_kv_heads=1), 16)


def test_a_tokens_own_key_alone(device, dtype) -> None:
    check(case(device, dtype, tiles=[0], blocks=[0], rows_per_tile=1, num_kv_heads=1), 1)


def test_blocks_are_split_over_programs(device, dtype, monkeypatch) -> None:
    monkeypatch.setattr(score, "MIN_KEYS_PER_PROGRAM", 32)
    blocks = list(range(9))
    check(case(device, dtype, tiles=[3, 6, 8], blocks=blocks, rows_per_tile=2, num_kv_heads=1), 1)


@pytest.mark.parametrize(("tiles", "blocks"), [([], [0, 1]), ([0, 1], []), ([], [])])
def test_nothing_to_score(device, dtype, tiles, blocks) -> None:
    empty = case(device, dtype, tiles=tiles, blocks=blocks, rows_per_tile=3)
    block_lse, lse = score.score_blocks(*empty)
    assert torch.isneginf(lse).all()
    seen = score.seen_blocks(empty.tiles, empty.blocks)
    mean, probes = score.block_masses(block_lse, lse, seen, 2)
    assert mean.shape == (2, len(tiles), len(blocks))
    assert probes.shape == (2, len(tiles), len(blocks), 1)


def test_a_page_too_large(device, dtype) -> None:
    with pytest.raises(ValueError, match="512"):
        score.score_blocks(
            *case(device, dtype, tiles=[0], blocks=[0], rows_per_tile=1, page_size=512)
        )
