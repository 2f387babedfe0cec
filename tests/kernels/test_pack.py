"""Messages of all-to-alls: the Triton kernels against torch, column by column, bit for bit."""

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
)
from csps_kernels.twins import pack as twin


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def partials(
    device: torch.device, dtype: torch.dtype, num_rows: int, num_heads: int, dim: int
) -> tuple[Tensor, Tensor]:
    """Rows that lie apart."""
    generator = torch.Generator().manual_seed(num_rows * 100 + num_heads)
    o = torch.randn(num_rows, 2 * num_heads, dim, generator=generator).to(device, dtype)
    lse = torch.randn(num_rows, num_heads + 3, generator=generator)
    lse[::3] = -torch.inf
    return o[:, :num_heads], lse.to(device)[:, :num_heads]


@pytest.mark.parametrize("own", [1, 2, 3])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("num_rows", [1, 70])
def test_partials_of_every_peer(device, dtype, num_rows: int, dim: int, own: int) -> None:
    """Of unequal numbers of heads, and of none; own rows go behind another rank's."""
    by_peer = [range(3), range(3, 3), range(3, 8), range(8, 9)]
    o, lse = partials(device, dtype, num_rows, 9, dim)
    columns = head_columns(by_peer, own, device)
    head_bytes = dim * dtype.itemsize + 4
    found, expected = (
        torch.zeros(num_rows + 2, len(by_peer[own]) * head_bytes, dtype=torch.uint8, device=device)
        for _ in range(2)
    )
    message = pack_partials(o, lse, columns, found[1:-1])
    same(message, twin.pack_partials(o, lse, columns, expected[1:-1]))
    same(found, expected)
    rows = {peer: pack(o[:, heads], lse[:, heads]) for peer, heads in enumerate(by_peer)}
    same(found[1:-1], rows.pop(own))
    same(message, torch.cat([part.flatten() for part in rows.values()]))


def test_no_partials(device, dtype) -> None:
    """No rows, then no heads."""
    o, lse = partials(device, dtype, 3, 2, 64)
    own = torch.empty(3, 0, dtype=torch.uint8, device=device)
    columns = head_columns([[0, 1], []], 1, device)
    assert pack_partials(o[:0], lse[:0], columns, own[:0]).shape == (0,)
    none = head_columns([[], []], 1, device)
    assert pack_partials(o[:, :0], lse[:, :0], none, own).shape == (0,)


def four_peers(own: int, device: torch.device) -> HeadColumns:
    """6 query heads, 3 KV heads; peers have 3, 2, 0 and 1 query heads, KV head 1 goes to two."""
    k, v = 6, 9
    by_peer = [[0, 1, 2, k, k + 1, v, v + 1], [3, 4, k + 1, v + 1], [], [5, k + 2, v + 2]]
    return head_columns(by_peer, own, device)


def heads(
    device: torch.device, dtype: torch.dtype, num_tokens: int, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k contiguous, v a view of the projections' output."""
    generator = torch.Generator().manual_seed(num_tokens + dim)
    q = torch.randn(num_tokens, 6, dim, generator=generator).to(device, dtype)
    k = torch.randn(num_tokens, 3, dim, generator=generator).to(device, dtype)
    v = torch.randn(num_tokens, 3, 4, dim, generator=generator).to(device, dtype)[:, :, 3]
    return q, k, v


@pytest.mark.parametrize("own", [0, 1, 2])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("num_tokens", [1, 70])
def test_heads_of_every_peer(device, dtype, num_tokens: int, dim: int, own: int) -> None:
    columns = four_peers(own, device)
    tensors = heads(device, dtype, num_tokens, dim)
    own_shape = num_tokens, columns.num_own, dim
    found, expected = (torch.empty(own_shape, dtype=dtype, device=device) for _ in range(2))
    message = pack_heads(*tensors, columns, found)
    same(message, twin.pack_heads(*tensors, columns, expected))
    same(found, expected)
    q, k, v = tensors
    second = torch.cat((q[:, 3:5], k[:, 1:2], v[:, 1:2]), dim=1)
    first_heads = 0 if own == 0 else 7
    in_message = message[num_tokens * first_heads :][: num_tokens * 4]
    same(found if own == 1 else in_message.view(num_tokens, 4, dim), second)


@pytest.mark.parametrize("own", [0, 1, 2])
@pytest.mark.parametrize("num_tokens", [1, 70])
def test_heads_return(device, dtype, num_tokens: int, own: int) -> None:
    """What the peers computed for these tokens; a head that nobody sent stays."""
    by_peer = [[0, 1], [], [2, 4, 5]]
    columns = head_columns(by_peer, own, device)
    sent = heads(device, dtype, num_tokens, 64)[0]
    parts = [sent[:, of_peer].contiguous() for of_peer in by_peer]
    mine = parts.pop(own)
    message = torch.cat([part.view(-1, 64) for part in parts])
    found, expected = (
        torch.full((num_tokens, 7, 64), torch.nan, dtype=dtype, device=device) for _ in range(2)
    )
    unpack_heads(message, columns, mine, found[:, :6])
    twin.unpack_heads(message, columns, mine, expected[:, :6])
    same(found, expected)
    assert found[:, [3, 6]].isnan().all()
    arrived = [0, 1, 2, 4, 5]
    same(found[:, arrived], sent[:, arrived])


def test_a_head_of_two_peers_is_the_first_ones(device, dtype) -> None:
    columns = head_columns([[0, 1], [1], [2, 1]], 2, device, once=True)
    message = torch.arange(3.0).repeat_interleave(2)[:, None].expand(-1, 64).contiguous()
    mine = torch.full((2, 2, 64), 9.0, device=device, dtype=dtype)
    out = torch.empty(2, 3, 64, device=device, dtype=dtype)
    unpack_heads(message.to(device, dtype).contiguous(), columns, mine, out)
    # Of two tokens the first peer's heads: 0 0, then 1 1.
    assert out[:, :, 0].tolist() == [[0.0, 0.0, 9.0], [1.0, 1.0, 9.0]]


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_nothing_to_pack(device, dtype, num_tokens: int) -> None:
    columns = head_columns([[], []], 0, device) if num_tokens else four_peers(1, device)
    q, k, v = heads(device, dtype, num_tokens, 64)
    own = q.new_empty(num_tokens, columns.num_own, 64)
    message = pack_heads(q, k, v, columns, own)
    assert message.shape == (0, 64)
    unpack_heads(message, columns, own, q)
