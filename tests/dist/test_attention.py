"""The merge of partial attention, and one rank's shards against dense attention."""

import pytest
import torch

from csps.attention.backends.torch_cpu import TorchCpu
from csps.attention.merge import merge_into, pack, packed_row_bytes, unpack


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
