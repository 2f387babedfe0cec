"""What FlashInfer is told of a step's shards, against a loop that reads slot by slot."""

import itertools
import math

import numpy as np
import pytest
import torch

from csps.attention.backends.flashinfer_tables import (
    natural_log,
    page_table,
    splits_keys,
    uses_tensor_cores,
    workspace_bytes,
)
from csps.attention.shards import Run


def slots_of(shard: tuple[Run, ...]) -> list[int]:
    return [slot for run in shard for slot in range(run.first_slot, run.first_slot + run[1])]


def random_shards(page_size: int, num_rows: int, seed: int) -> list[tuple[Run, ...]]:
    """Up to 4 runs of up to 5 pages each; the last run of a row may end inside a page."""
    rng = np.random.default_rng(seed)
    shards = []
    for _ in range(num_rows):
        runs = []
        for _ in range(rng.integers(0, 5)):
            first, pages = int(rng.integers(0, 100)), int(rng.integers(1, 6))
            runs.append(Run(first * page_size, pages * page_size))
        if runs:
            short = int(rng.integers(0, page_size))
            runs[-1] = runs[-1]._replace(num_tokens=runs[-1].num_tokens - short)
        shards.append(tuple(runs))
    return shards


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("seed", range(4))
def test_slots_are_those_of_the_shards(page_size: int, seed: int) -> None:
    shards = random_shards(page_size, 12, seed)
    table = page_table(shards, page_size)
    assert {x.dtype for x in table[1:]} == {torch.int32}
    assert table.rows.tolist() == [row for row, shard in enumerate(shards) if shard]
    bounds = itertools.pairwise(table.indptr.tolist())
    for row, (start, stop), last in zip(
        table.rows.tolist(), bounds, table.last_page_len.tolist(), strict=True
    ):
        assert 1 <= last <= page_size
        pages = table.indices[start:stop].tolist()
        slots = [page * page_size + at for page in pages for at in range(page_size)]
        assert slots[: len(slots) - page_size + last] == slots_of(shards[row])
    assert table.indptr[0] == 0
    assert table.indptr[-1] == len(table.indices)


@pytest.mark.parametrize("shards", [[], [()], [(), ()]])
def test_no_keys(shards: list[tuple[Run, ...]]) -> None:
    table = page_table(shards, 16)
    assert [len(x) for x in table] == [0, 1, 0, 0]


def test_logarithms_become_natural() -> None:
    """Also in place, and into parts of a message."""
    scores = torch.randn(7, 3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    base_2 = (scores / math.log(2)).exp2().sum(-1).log2().float()
    message = torch.full((7, 5), torch.nan)
    natural_log(base_2, out=message[:, 1:4])
    torch.testing.assert_close(message[:, 1:4], scores.logsumexp(-1).float())
    assert message[:, [0, 4]].isnan().all()
    natural_log(base_2, out=base_2)
    torch.testing.assert_close(base_2, message[:, 1:4])


def test_ways() -> None:
    assert [group for group in range(1, 9) if not uses_tensor_cores(group)] == [1, 2, 3]
    assert splits_keys(1, 32, 132)
    assert splits_keys(512, 32, 132)
    assert not splits_keys(513, 32, 132)


@pytest.mark.parametrize(("group", "tile"), [(4, 16), (16, 16), (17, 64), (80, 128)])
def test_workspace_holds_what_a_plan_asks_for(group: int, tile: int) -> None:
    """2 programs a multiprocessor, each with a tile of rows for all heads of the group."""
    num_processors, head_dim, num_kv_heads = 132, 128, 8
    num_programs = 2 * num_processors // num_kv_heads
    outputs = num_kv_heads * group * num_programs * tile * head_dim * 4
    sums = outputs // head_dim
    assert workspace_bytes(group, head_dim, num_processors) >= outputs + sums + 32
    num_rows = 64
    in_graph = workspace_bytes(
        group, head_dim, num_processors, rows_in_graph=num_rows * num_kv_heads
    )
    num_tiles = -(-num_rows * group // tile) + num_rows - 1
    assert in_graph >= (outputs + sums) * num_tiles // num_programs + 32
