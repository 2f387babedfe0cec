"""Messages by head on all ranks of an axis, passed on by hand: each rank has what it is to have.

Every other rank packs by torch: messages of the backends are the same.
"""

import pytest
import torch
from torch import Tensor

from csps.attention import messages as by_torch
from csps.attention.backends import HeadMessages
from csps.attention.backends.triton_messages import HeadMessages as ByTriton
from csps.attention.merge import pack
from csps.core.heads import AxisHeads, HeadPart, all_heads

DIM = 64
AXES = {
    "even": AxisHeads(all_heads(8, 4), tuple(all_heads(8, 4).split(2))),
    "uneven": AxisHeads(all_heads(6, 3), tuple(all_heads(6, 3).split(2))),
    "shared": AxisHeads(all_heads(9, 3), tuple(all_heads(9, 3).split(4))),
    "without": AxisHeads(all_heads(2, 1), tuple(all_heads(2, 1).split(3))),
    "second half": AxisHeads(HeadPart(1, 3, 0, 3), tuple(HeadPart(1, 3, 0, 3).split(3))),
}


@pytest.fixture(params=AXES)
def heads(request) -> AxisHeads:
    return AXES[request.param]


@pytest.fixture(params=[by_torch.HeadMessages, ByTriton], ids=["torch", "triton"])
def ranks(request, heads: AxisHeads, device: torch.device) -> list[HeadMessages]:
    makers = request.param, by_torch.HeadMessages
    return [makers[rank % 2](heads, rank, device) for rank in range(len(heads.parts))]


def tokens(heads: AxisHeads, num_tokens: int, device: torch.device) -> tuple[Tensor, ...]:
    """q, k and v of all heads, v strided."""
    generator = torch.Generator().manual_seed(num_tokens)
    counts = heads.resident.num_heads, heads.resident.num_kv_heads, heads.resident.num_kv_heads
    q, k, v = (torch.randn(num_tokens, n, 2, DIM, generator=generator).to(device) for n in counts)
    return q[:, :, 0].contiguous(), k[:, :, 0].contiguous(), v[:, :, 1]


def parts(heads: AxisHeads, peer: int, qkv: tuple[Tensor, ...]) -> list[Tensor]:
    q, k, v = qkv
    return [q[:, heads.queries(peer)], k[:, heads.keys(peer)], v[:, heads.keys(peer)]]


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_each_gets_its_heads(heads, ranks, device, num_tokens: int) -> None:
    """Ulysses there: rank r has `num_tokens + r` tokens, of all heads."""
    qkv = [tokens(heads, num_tokens + rank, device) for rank in range(len(ranks))]
    sent: list[dict[int, Tensor]] = []
    for rank, messages in enumerate(ranks):
        own = qkv[rank][0].new_empty(num_tokens + rank, heads.parts[rank].num_qkv_heads, DIM)
        sent.append(messages.pack_qkv(*qkv[rank], own))
        assert rank not in sent[rank]
        assert all(message.is_contiguous() for message in sent[rank].values())
        sent[rank][rank] = own
    for rank, part in enumerate(heads.parts):
        for peer, of_peer in enumerate(qkv):
            found = sent[peer][rank].view(num_tokens + peer, part.num_qkv_heads, DIM)
            same(found, torch.cat(parts(heads, rank, of_peer), dim=1))


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_outputs_return(heads, ranks, device, num_tokens: int) -> None:
    """Ulysses back."""
    expected, _, _ = tokens(heads, num_tokens, device)
    by_rank = [expected[:, heads.queries(rank)].contiguous() for rank in range(len(ranks))]
    for rank, messages in enumerate(ranks):
        others = [part.view(-1, DIM) for peer, part in enumerate(by_rank) if peer != rank]
        same(messages.unpack_outputs(torch.cat(others), by_rank[rank]), expected)


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_all_heads_of_all(heads, ranks, device, num_tokens: int) -> None:
    """Helix there."""
    qkv = tokens(heads, num_tokens, device)
    own = [messages.own_qkv(*parts(heads, rank, qkv)) for rank, messages in enumerate(ranks)]
    for rank, messages in enumerate(ranks):
        others = [part.view(-1, DIM) for peer, part in enumerate(own) if peer != rank]
        same(messages.unpack_qkv(torch.cat(others), own[rank]), torch.cat(qkv, dim=1))


@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_partials_return(heads, ranks, device, num_rows: int) -> None:
    """Helix back: each rank's rows, packed, the own ones behind one that is not theirs."""
    o, _, _ = tokens(heads, num_rows, device)
    lse = torch.randn(o.shape[:2], generator=torch.Generator().manual_seed(1)).to(device)
    row_bytes = DIM * o.element_size() + 4
    for rank, messages in enumerate(ranks):
        width = heads.parts[rank].num_heads * row_bytes
        own = torch.empty(num_rows + 1, width, dtype=torch.uint8, device=device)[1:]
        sent = {**messages.pack_partials(o, lse, own), rank: own}
        assert sorted(sent) == list(range(len(ranks)))
        for peer, message in sent.items():
            queries = heads.queries(peer)
            same(message.flatten(), pack(o[:, queries], lse[:, queries]).flatten())
