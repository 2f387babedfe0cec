"""The merge of partial attention, and one rank's shards against dense attention."""

import numpy as np
import pytest
import torch

from csps.attention.backends.torch_cpu import TorchCpu, cpu_kernels
from csps.attention.merge import merge_into, merge_rows, pack, packed_row_bytes, unpack
from csps.attention.shards import Run
from csps.engine.kv_pool import KVPool


def dense(q_THD, k_LKD, v_LKD, *, causal):
    """Plain softmax attention in fp64 and its log-sum-exp."""
    group = q_THD.shape[1] // k_LKD.shape[1]
    k = k_LKD.double().repeat_interleave(group, dim=1)
    v = v_LKD.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("thd,lhd->htl", q_THD.double(), k) / q_THD.shape[2] ** 0.5
    if causal:
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    o = torch.einsum("htl,lhd->thd", scores.softmax(-1), v)
    return o.float(), scores.logsumexp(-1).T.float()


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize(("num_rows", "num_keys", "causal"), [
    (1, 1, False), (1, 300, False), (2, 5, False), (70, 300, False), (1, 1, True), (97, 97, True),
])  # fmt: skip
def test_partial(num_rows, num_keys, causal, upcast) -> None:
    q = torch.randn(num_rows, 6, 32)
    k, v = torch.randn(2, num_keys, 2, 32)
    partial = TorchCpu(upcast=upcast)
    expected = dense(q, k, v, causal=causal)
    torch.testing.assert_close(partial(q, k, v, causal=causal), expected, rtol=1e-4, atol=1e-5)
    halves = [x.bfloat16() for x in (q, k, v)]
    o, lse = partial(*halves, causal=causal)
    expected = dense(*halves, causal=causal)
    torch.testing.assert_close(o.float(), expected[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, expected[1], rtol=2e-2, atol=2e-2)


def test_merge_of_disjoint_keys_is_dense() -> None:
    q, (k, v) = torch.randn(5, 6, 16), torch.randn(2, 90, 3, 16)
    acc, lse = torch.full((5, 6, 16), 7.0), torch.full((5, 6), -torch.inf)
    for part in (slice(0, 1), slice(1, 60), slice(60, 90)):
        merge_into(acc, lse, *dense(q, k[part], v[part], causal=False))
    torch.testing.assert_close((acc, lse), dense(q, k, v, causal=False), rtol=1e-4, atol=1e-5)


def test_merge_with_empty_sides() -> None:
    o, lse = torch.randn(2, 3, 4), torch.randn(2, 3)
    acc, acc_lse = o.clone(), lse.clone()
    merge_into(acc, acc_lse, torch.randn(2, 3, 4), torch.full((2, 3), -torch.inf))
    torch.testing.assert_close((acc, acc_lse), (o, lse))
    empty = torch.full((2, 3), -torch.inf)
    merge_into(acc, empty, torch.randn(2, 3, 4), torch.full((2, 3), -torch.inf))
    assert torch.isfinite(acc).all()
    assert torch.isneginf(empty).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_pack_round_trip(dtype, num_rows) -> None:
    o, lse = torch.randn(num_rows, 3, 8).to(dtype), torch.randn(num_rows, 3)
    message = pack(o, lse)
    assert message.shape == (num_rows, packed_row_bytes(3, 8, dtype.itemsize))
    torch.testing.assert_close(unpack(message, 3, 8, dtype), (o, lse), rtol=0, atol=0)


def test_unpacked_is_part_of_the_message() -> None:
    o, lse = torch.randn(4, 3, 8), torch.randn(4, 3)
    message = torch.empty_like(pack(o, lse))
    for part, value in zip(unpack(message, 3, 8, o.dtype), (o, lse), strict=True):
        part.copy_(value)
    torch.testing.assert_close(message, pack(o, lse), rtol=0, atol=0)


@pytest.mark.parametrize("with_own", [False, True])
def test_merge_rows_of_disjoint_keys_is_dense(with_own) -> None:
    """Each source has keys of some rows; one row has keys nowhere, unless here."""
    q, (k, v) = torch.randn(4, 6, 16), torch.randn(2, 90, 3, 16)
    parts = [(np.array([0, 2]), slice(10, 30)), (np.array([2]), slice(30, 31)),
             (np.array([1, 2]), slice(31, 90))]  # fmt: skip
    own = dense(q, k[:10], v[:10], causal=False) if with_own else None
    messages = [pack(*dense(q[rows], k[keys], v[keys], causal=False)) for rows, keys in parts]
    merge = merge_rows([rows for rows, _ in parts], 4, torch.device("cpu"))
    out = torch.full_like(q, torch.nan)
    merge(torch.cat(messages), out, own)
    for row in range(4):
        seen = [slice(0, 10)] if with_own else []
        seen += [keys for rows, keys in parts if row in rows]
        if seen:
            keys, values = (torch.cat([x[part] for part in seen]) for x in (k, v))
            expected, _ = dense(q[row : row + 1], keys, values, causal=False)
            torch.testing.assert_close(out[row : row + 1], expected, rtol=1e-4, atol=1e-5)
        else:
            assert not out[row].any()


def test_rows_attend_to_their_shards() -> None:
    """Shards of few runs, of many, and of none, in two layers of a pool."""
    pool = KVPool(
        num_layers=2, num_pages=20, block_size=4, num_kv_heads=2, head_dim=16, staging_blocks=0,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    pool.flat_keys.normal_()
    pool.flat_values.normal_()
    shards = [
        (Run(8, 16),),
        (),
        (Run(60, 4), Run(0, 8), Run(32, 3)),
        tuple(Run(8 * page, 4) for page in range(7)),
    ]
    attend = cpu_kernels(upcast=False, num_threads=1).paged_decode(pool, shards)
    for layer in range(2):
        q = torch.randn(4, 6, 16)
        o, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
        attend(layer, q, o, lse)
        for row, runs in enumerate(shards):
            if runs:
                expected = dense(q[row : row + 1], *pool.gather(layer, runs), causal=False)
                found = (o[row : row + 1], lse[row : row + 1])
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not o[1].any()
        assert lse[1].isneginf().all()
