"""Rotary embedding and store: the Triton kernel against one operation at a time."""

import pytest
import torch
from torch import Tensor

from csps_kernels.rope_store import Places, rope_store
from csps_kernels.twins.rope_store import rope_store as twin

NUM_SLOTS = 48
NUM_POSITIONS = 100
# The kernel may contract a product and a sum, before it rounds to the output's type.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def case(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_tokens: int,
    group: int = 3,
    num_kv_heads: int = 2,
    dim: int = 64,
) -> list[Tensor]:
    """What comes before the pool: q, k and v as views of fused projections, positions anywhere."""
    generator = torch.Generator().manual_seed(num_tokens * 100 + group * 10 + dim)
    shape = (num_tokens, num_kv_heads, group + 2, dim)
    qkv = torch.randn(shape, generator=generator).to(device, dtype)
    angles = torch.rand(NUM_POSITIONS, dim // 2, generator=generator) * 7.0
    table = torch.cat((angles.cos(), angles.sin()), dim=1).to(device)
    positions = torch.randint(NUM_POSITIONS, (num_tokens,), generator=generator).to(device)
    slots = torch.randperm(NUM_SLOTS, generator=generator)[:num_tokens].to(device)
    return [qkv[:, :, : group + 1], qkv[:, :, group + 1], table, positions, slots]


def pool(like: Tensor, num_kv_heads: int = 2) -> list[Tensor]:
    """Keys and values, NaN wherever nothing is stored."""
    shape = (num_kv_heads, NUM_SLOTS, like.shape[-1])
    return [like.new_full(shape, torch.nan) for _ in range(2)]


def check(arguments: list[Tensor], num_kv_heads: int = 2) -> None:
    found, expected = pool(arguments[0], num_kv_heads), pool(arguments[0], num_kv_heads)
    *before, slots = arguments
    rotated = rope_store(*before, Places(slots, *found))
    expected_rotated = twin(*before, Places(slots, *expected))
    dtype = arguments[0].dtype
    assert all(x.dtype == dtype and x.is_contiguous() for x in rotated)
    tolerance = TOLERANCES[dtype]
    for one, other in zip([*rotated, *found], [*expected_rotated, *expected], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 33])
def test_any_number_of_tokens(device, dtype, num_tokens: int) -> None:
    check(case(device, dtype, num_tokens=num_tokens))


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("dim", [64, 128])
def test_groups_and_head_dims(device, dtype, group: int, dim: int) -> None:
    check(case(device, dtype, num_tokens=5, group=group, dim=dim))


def test_a_head_dim_that_is_no_power_of_2(device, dtype) -> None:
    check(case(device, dtype, num_tokens=5, dim=80))


def test_one_kv_head(device, dtype) -> None:
    check(case(device, dtype, num_tokens=9, num_kv_heads=1), num_kv_heads=1)


def test_tokens_without_a_slot_are_rotated_and_not_stored(device, dtype) -> None:
    arguments = case(device, dtype, num_tokens=6)
    arguments[4][::2] = -1
    check(arguments)


def test_nothing_is_stored_without_places(device, dtype) -> None:
    *before, _ = case(device, dtype, num_tokens=6)
    tolerance = TOLERANCES[dtype]
    for one, other in zip(rope_store(*before, None), twin(*before, None), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_normed_heads_that_are_no_view_of_the_projections(device, dtype) -> None:
    arguments = case(device, dtype, num_tokens=6)
    arguments[0] = arguments[0].clone()
    check(arguments)


def test_no_tokens(device, dtype) -> None:
    keys, values = pool(case(device, dtype, num_tokens=0)[0])
    *before, slots = case(device, dtype, num_tokens=0)
    q, k = rope_store(*before, Places(slots, keys, values))
    assert q.shape == (0, 6, 64)
    assert k.shape == (0, 2, 64)
    assert keys.isnan().all()
    assert values.isnan().all()
