"""Dense attention against its twin: causal or not, odd lengths, groups, strides, parts."""

import pytest
import torch
from torch import Tensor

from csps_kernels.causal import attention
from csps_kernels.twins.causal import attention as twin
from tests.kernels.close import assert_like_twin


def normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def inputs(
    device: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    num_keys: int,
    *,
    group: int = 2,
    num_kv_heads: int = 2,
    num_seqs: int = 1,
    dim: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, H, T, D], k, v [N, K, L, D]."""
    q = normal(device, dtype, num_seqs, num_kv_heads * group, num_tokens, dim)
    k, v = normal(device, dtype, 2, num_seqs, num_kv_heads, num_keys, dim)
    return q, k, v


def check(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **options: int) -> None:
    found = attention(q, k, v, causal=causal, **options)
    assert_like_twin(found, twin(q, k, v, causal=causal), q.dtype)


@pytest.mark.parametrize("num_tokens", [1, 2, 31, 64, 65, 150])
def test_causal(device, dtype, num_tokens: int) -> None:
    """Within a step of the loop, at its edge, over it."""
    check(*inputs(device, dtype, num_tokens, num_tokens), causal=True)


@pytest.mark.parametrize(
    ("num_tokens", "num_keys"), [(1, 1), (1, 130), (3, 64), (40, 63), (70, 65), (5, 128)]
)
def test_all_keys(device, dtype, num_tokens: int, num_keys: int) -> None:
    check(*inputs(device, dtype, num_tokens, num_keys), causal=False)


@pytest.mark.parametrize("group", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("causal", [True, False])
def test_groups(device, dtype, group: int, causal: bool) -> None:
    check(*inputs(device, dtype, 37, 37, group=group, num_kv_heads=1), causal=causal)


@pytest.mark.parametrize("dim", [16, 32, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_head_dims(device, dtype, dim: int, causal: bool) -> None:
    check(*inputs(device, dtype, 70, 70, dim=dim, num_kv_heads=1), causal=causal)


@pytest.mark.parametrize("num_parts", [2, 3, 100])
def test_keys_in_parts(device, dtype, num_parts: int) -> None:
    """More parts than there are steps too."""
    check(*inputs(device, dtype, 3, 200), causal=False, num_parts=num_parts)


def test_many_sequences(device, dtype) -> None:
    """Tiles over their own tokens, as the diagonal is."""
    check(*inputs(device, dtype, 16, 16, num_seqs=5, num_kv_heads=1, group=3), causal=True)


@pytest.mark.parametrize("causal", [True, False])
def test_tokens_before_heads(device, dtype, causal: bool) -> None:
    """Views of [T, H, D], and of keys within a longer shard; what lies around is NaN."""
    q, k, v = inputs(device, dtype, 40, 40)
    expected = twin(q, k, v, causal=causal)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    shard = torch.full((2, 1, 2, 90, 64), torch.nan, device=device, dtype=dtype)
    shard[0, :, :, 30:70], shard[1, :, :, 30:70] = k, v
    found = attention(q, *shard[:, :, :, 30:70], causal=causal)
    assert_like_twin(found, expected, dtype)


def test_no_sequences(device, dtype) -> None:
    q, k, v = inputs(device, dtype, 16, 16, num_seqs=0)
    o, lse = attention(q, k, v, causal=True)
    assert o.shape == q.shape
    assert lse.shape == q.shape[:3]


def test_a_head_dim_that_does_not_fit(device) -> None:
    with pytest.raises(ValueError, match="head dim 24 is not a power of 2"):
        attention(*inputs(device, torch.float32, 4, 4, dim=24), causal=True)
