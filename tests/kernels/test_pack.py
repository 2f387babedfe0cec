"""Messages of all-to-alls: the Triton kernels against torch, part by part, bit for bit."""

import pytest
import torch
from torch import Tensor

from csps.attention.merge import pack
from csps_kernels.pack import (
    HeadColumns,
    head_columns,
    pack_heads,
    pack_partials,
    unpack_heads,
    unpack_partials,
)
from csps_kernels.twins import pack as twin


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def partials(
    device: torch.device, dtype: torch.dtype, num_rows: int, num_heads: int, dim: int = 64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows * 100 + num_heads)
    o = torch.randn(num_rows, num_heads, dim, generator=generator).to(device, dtype)
    lse = torch.randn(num_rows, num_heads, generator=generator)
    lse[::3] = -torch.inf
    return o, lse.to(device)


@pytest.mark.parametrize(("num_heads", "dim"), [(1, 64), (9, 64), (32, 128), (70, 128), (3, 80)])
def test_rows_of_partials(device, dtype, num_heads: int, dim: int) -> None:
    """Any rows in any order, some for two peers."""
    o, lse = partials(device, dtype, 7, num_heads, dim)
    rows = torch.tensor([5, 0, 0, 6, 2], device=device)
    message = pack_partials(o, lse, rows, dtype)
    same(message, twin.pack_partials(o, lse, rows, dtype))
    same(message, pack(o[rows], lse[rows]))


def test_partials_are_rounded_to_the_models_type(device, dtype) -> None:
    o, lse = partials(device, torch.float32, 4, 6)
    rows = torch.arange(4, device=device)
    same(pack_partials(o, lse, rows, dtype), pack(o.to(dtype), lse))


def test_rows_of_heads_that_are_not_all(device, dtype) -> None:
    """Each peer gets its own heads: a view of o and lse."""
    o, lse = partials(device, dtype, 5, 8)
    rows = torch.tensor([1, 4], device=device)
    message = pack_partials(o[:, 2:5], lse[:, 2:5], rows, dtype)
    same(message, pack(o[rows, 2:5], lse[rows, 2:5]))


@pytest.mark.parametrize("into", [torch.float32, None])
def test_partials_return_to_their_rows(device, dtype, into: torch.dtype | None) -> None:
    o, lse = partials(device, dtype, 5, 9)
    message = pack(o, lse)
    rows = torch.tensor([6, 2, 0, 3, 7], device=device)
    shape = (9, 9, 64)
    found, expected = (
        (
            torch.full(shape, torch.nan, dtype=into or dtype, device=device),
            torch.full(shape[:2], torch.nan, device=device),
        )
        for _ in range(2)
    )
    unpack_partials(message, rows, dtype, *found)
    twin.unpack_partials(message, rows, dtype, *expected)
    for one, other in zip(found, expected, strict=True):
        same(one, other)
    same(found[1][rows], lse)
    assert found[0][[1, 4, 5, 8]].isnan().all()


def test_no_rows(device, dtype) -> None:
    o, lse = partials(device, dtype, 3, 2)
    none = torch.empty(0, dtype=torch.int64, device=device)
    message = pack_partials(o, lse, none, dtype)
    assert message.shape == (0, 2 * (64 * dtype.itemsize + 4))
    before = o.clone()
    unpack_partials(message, none, dtype, o, lse)
    same(o, before)


def three_peers(device: torch.device) -> HeadColumns:
    """6 query heads, 3 KV heads; peers have 3, 2 and 1 query heads, KV head 1 goes to two."""
    k, v = 6, 9
    return head_columns(
        [[0, 1, 2, k, k + 1, v, v + 1], [3, 4, k + 1, v + 1], [5, k + 2, v + 2]], device
    )


def heads(
    device: torch.device, dtype: torch.dtype, num_tokens: int, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k contiguous, v a view of the projections' output."""
    generator = torch.Generator().manual_seed(num_tokens + dim)
    q = torch.randn(num_tokens, 6, dim, generator=generator).to(device, dtype)
    k = torch.randn(num_tokens, 3, dim, generator=generator).to(device, dtype)
    v = torch.randn(num_tokens, 3, 4, dim, generator=generator).to(device, dtype)[:, :, 3]
    return q, k, v


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("num_tokens", [1, 5, 33])
def test_heads_of_every_peer(device, dtype, num_tokens: int, dim: int) -> None:
    columns = three_peers(device)
    tensors = heads(device, dtype, num_tokens, dim)
    message = pack_heads(*tensors, columns)
    same(message, twin.pack_heads(*tensors, columns))
    q, k, v = tensors
    second = message[num_tokens * 7 : num_tokens * 11].view(num_tokens, 4, dim)
    same(second, torch.cat((q[:, 3:5], k[:, 1:2], v[:, 1:2]), dim=1))


@pytest.mark.parametrize("num_tokens", [1, 33])
def test_heads_return(device, dtype, num_tokens: int) -> None:
    """What the peers computed for these tokens; a head that nobody sent stays."""
    columns = head_columns([[0, 1], [], [2, 4, 5]], device)
    message = heads(device, dtype, num_tokens, 64)[0][:, :5].contiguous().view(-1, 64)
    found, expected = (
        torch.full((num_tokens, 6, 64), torch.nan, dtype=dtype, device=device) for _ in range(2)
    )
    unpack_heads(message, columns, found)
    twin.unpack_heads(message, columns, expected)
    same(found, expected)
    assert found[:, 3].isnan().all()
    same(found[:, :2], message[: num_tokens * 2].view(num_tokens, 2, 64))


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_nothing_to_pack(device, dtype, num_tokens: int) -> None:
    columns = head_columns([[], []], device) if num_tokens else three_peers(device)
    q, k, v = heads(device, dtype, num_tokens, 64)
    message = pack_heads(q, k, v, columns)
    assert message.shape == (0, 64)
    unpack_heads(message, columns, q)
