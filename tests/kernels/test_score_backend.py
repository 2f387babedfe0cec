"""Scores as selection asks for them: the triton backend's against torch's."""

import pytest
import torch

from csps.attention.backends.triton_score import score
from csps.attention.score import BlockKeys, score_rows
from csps.attention.select import RowSampler

BLOCK_SIZE, NUM_KV_HEADS, GROUP, DIM = 16, 2, 3, 64

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")


@pytest.mark.parametrize("rows_per_tile", [4, 0])
def test_like_torch(device, dtype, rows_per_tile: int) -> None:
    """Four tiles, of which the first one's own block and what is before lie elsewhere."""
    generator = torch.Generator().manual_seed(rows_per_tile)
    sampler = RowSampler(
        block_size=BLOCK_SIZE,
        num_kv_heads=NUM_KV_HEADS,
        group_size=GROUP,
        rows_per_tile=rows_per_tile,
        seed=1,
        device=device,
    )
    tiles, blocks = (torch.tensor(x, device=device) for x in ([1, 3, 4, 6], [3, 4, 5]))
    q = torch.randn(len(tiles), BLOCK_SIZE, NUM_KV_HEADS, GROUP, DIM, generator=generator) * 2
    flat = torch.randn(9, BLOCK_SIZE, DIM, generator=generator).to(device, dtype)
    probes = sampler.draw(0, 7)
    rows = sampler.take(probes, tiles, q.to(device, dtype))
    positions = tiles[:, None] * BLOCK_SIZE + sampler.offsets(probes, tiles)
    keys = BlockKeys(flat, torch.tensor([[5, 0, 7], [2, 8, 1]], device=device))
    found = score(rows, positions, tiles, keys, blocks)
    expected = score_rows(rows, positions, tiles, keys, blocks)
    num_chosen = sampler.num_chosen
    of_probes = slice(num_chosen, None)
    torch.testing.assert_close(
        found.lse[:, :, of_probes], expected.lse[:, :, of_probes], rtol=1e-4, atol=1e-3
    )
    # Torch's rows that choose have a fast exponential.
    torch.testing.assert_close(found.lse, expected.lse, rtol=0, atol=0.05)
    total = torch.logaddexp(expected.lse, torch.zeros_like(expected.lse))
    mean, probe_mass = found.masses(total, num_chosen)
    expected_mean, expected_probe_mass = expected.masses(total, num_chosen)
    torch.testing.assert_close(mean, expected_mean, rtol=0.05, atol=1e-3)
    torch.testing.assert_close(probe_mass, expected_probe_mass, rtol=2e-3, atol=1e-5)
