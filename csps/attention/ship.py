"""Queries travel to the KV and partial outputs come back: what decode and pass-Q share.

Suffixes: T rows, N shipped rows, H query heads, D head dim.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from csps.attention.merge import merge_into, pack, packed_row_bytes, unpack
from csps.parallel.collectives import SequenceComm

Output = tuple[Tensor, Tensor]  # (o [.., H, D], lse [.., H] fp32)


def ship_queries(
    comm: SequenceComm,
    q_THD: Tensor,
    shipped: Mapping[int, Tensor],
    num_asked: Mapping[int, int],
    attend_here: Callable[[], Output],
    answer: Callable[[int, Tensor], Output],
) -> Tensor:
    """o fp32 [T, H, D]: rows attended here, merged with what the peers in `shipped` answer.

    `shipped[p]`: rows that rank p has keys for, int64; `num_asked[p]`: rows that it ships here.
    `attend_here()`: (o fp32, lse) of all rows over the keys here, while queries travel.
    `answer(p, q [N, H, D])`: (o in q's dtype, lse) of a peer's rows over the keys here.
    Collective over the ranks that ship to each other.
    """
    num_heads, head_dim = q_THD.shape[1:]
    asked = {peer: q_THD.new_empty(num, num_heads, head_dim) for peer, num in num_asked.items()}
    outgoing = {peer: q_THD[rows] for peer, rows in shipped.items()}
    queries = comm.exchange("query", outgoing, asked)
    acc_THD, lse_TH = attend_here()
    queries.wait()
    answers = {peer: pack(*answer(peer, q_NHD)) for peer, q_NHD in asked.items()}
    row_bytes = packed_row_bytes(num_heads, head_dim, q_THD.element_size())
    replies = {
        peer: q_THD.new_empty(len(rows), row_bytes, dtype=torch.uint8)
        for peer, rows in shipped.items()
    }
    comm.exchange("partial", answers, replies).wait()
    for peer, rows in shipped.items():
        o_NHD, part_NH = unpack(replies[peer], num_heads, head_dim, q_THD.dtype)
        merged_NHD, merged_NH = acc_THD[rows], lse_TH[rows]
        merge_into(merged_NHD, merged_NH, o_NHD, part_NH)
        acc_THD[rows], lse_TH[rows] = merged_NHD, merged_NH
    return acc_THD
