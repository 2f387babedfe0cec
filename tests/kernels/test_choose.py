"""The choice of blocks against its twin, bit by bit: many equal masses, many that are 0."""

import pytest
import torch
from torch import Tensor

from csps.attention.select import WINDOW_BLOCKS, keep_by_mass
from csps_kernels.choose import choose
from csps_kernels.twins.choose import choose as twin


def masses(device, num_tiles: int, num_blocks: int) -> tuple[Tensor, Tensor]:
    """fp16 [3, N, J]: a few large ones; equal ones; exact zeros and what fp16 barely holds."""
    generator = torch.Generator().manual_seed(num_tiles + num_blocks)
    tiles = torch.randperm(num_blocks, generator=generator)[:num_tiles].sort().values
    mass = torch.rand(3, num_tiles, num_blocks, generator=generator)
    mass[0] **= 12
    mass[1] = (mass[1] * 4).round()
    mass[2] = torch.where(mass[2] < 0.5, 0.0, mass[2] ** 200)
    mass[:, :, 0] += 1e-3
    mass *= torch.arange(num_blocks) <= tiles[:, None]
    return (mass / mass.sum(2, keepdim=True)).half().to(device), tiles.to(device)


@pytest.mark.parametrize("gamma", [0.3, 0.9, 0.95, 0.9875, 1.0])
@pytest.mark.parametrize(("num_tiles", "num_blocks"), [(1, 1), (2, 3), (7, 40), (4, 130)])
def test_like_twin(device, num_tiles: int, num_blocks: int, gamma: float) -> None:
    mass, tiles = masses(device, num_tiles, num_blocks)
    found = choose(mass, tiles, gamma, 1)
    assert found.view(torch.uint8).max() == 1
    assert (found == twin(mass, tiles, gamma, 1)).all()


@pytest.mark.parametrize("window", [0, 3])
def test_windows(device, window: int) -> None:
    mass, tiles = masses(device, 6, 24)
    assert (choose(mass, tiles, 0.5, window) == twin(mass, tiles, 0.5, window)).all()


def test_all_mass_where_it_is_kept_anyway(device) -> None:
    mass = torch.zeros(1, 3, 20, dtype=torch.float16, device=device)
    tiles = torch.tensor([2, 11, 19], device=device)
    mass[0, 1, 11] = 1.0  # the first tile has none at all
    mass[0, 2, 0] = 1.0
    kept = choose(mass, tiles, 0.9, 1)[0]
    assert [row.nonzero().flatten().tolist() for row in kept] == [
        [0, 1, 2],
        [0, 10, 11],
        [0, 18, 19],
    ]


def test_no_tiles(device) -> None:
    mass, tiles = masses(device, 4, 8)
    assert choose(mass[:, :0], tiles[:0], 0.9, 1).shape == (3, 0, 8)


@pytest.mark.parametrize("gamma", [0.3, 0.95, 1.0])
def test_torch_chooses_the_same(device, gamma: float) -> None:
    mass, tiles = masses(device, 40, 100)
    (found,) = keep_by_mass(mass, tiles, [gamma])
    assert (found == twin(mass, tiles, gamma, WINDOW_BLOCKS)).all()
