"""Decode rows whose tables stay in place: one step after the other, on a GPU in a CUDA graph."""

import torch
from torch import Tensor

from csps.attention.backends.triton_decode import PagedDecode
from csps.attention.shards import Run
from csps.engine.cuda_graphs import GraphCapture
from csps.engine.kv_pool import KVPool
from csps.parallel.overlap import CommClock

NUM_ROWS = 4
# The steps' rows; more and fewer by turns, and pages that two rows share.
STEPS = [
    [(Run(16, 8), Run(40, 24), Run(0, 3)), (Run(72, 1),), (Run(64, 16),), (Run(16, 8),)],
    [(Run(8, 700),)],
    [],
    [(Run(0, 4),), (), (Run(80, 11),)],
]


def test_step_after_step(device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    pool = KVPool(
        num_layers=2,
        num_pages=90,
        block_size=8,
        num_kv_heads=2,
        head_dim=32,
        staging_blocks=0,
        dtype=torch.float32,
        device=device,
    )
    for flat in (pool.flat_keys, pool.flat_values):
        flat.normal_(generator=generator)
    decode = PagedDecode()
    q, o = torch.empty(2, NUM_ROWS, 6, 32, device=device)
    lse = torch.empty(NUM_ROWS, 6, device=device)
    rows = decode.fixed(pool, NUM_ROWS)

    def forward() -> Tensor:
        rows(1, q, o, lse)
        return o

    q.normal_(generator=generator)
    graphs = device.type == "cuda"
    replay = GraphCapture(device, CommClock())(forward) if graphs else forward
    # Before any step there is no key.
    replay()
    assert (o == 0.0).all()
    assert (lse == -torch.inf).all()
    for shards in STEPS:
        q.normal_(generator=generator)
        rows.load(shards)
        o.fill_(torch.nan)
        lse.fill_(torch.nan)
        replay()
        expected = torch.empty_like(o), torch.empty_like(lse)
        decode(pool, [*shards, *[()] * (NUM_ROWS - len(shards))])(1, q, *expected)
        assert torch.equal(o, expected[0])
        assert torch.equal(lse, expected[1])
