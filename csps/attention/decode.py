"""Decode over sharded KV: queries travel to the KV, (o, lse) comes back, KV never moves.

Per layer: the master of a row ships q to the other holders of the sequence's KV, each
answers with its partial output and log-sum-exp in one packed message, the master merges
(multi-master decode of LoongServe, arXiv 2404.09526). A token whose KV lies on P ranks costs
(P - 1)(2q + 4 Hq) bytes per layer, where q = Hq * D * e.

Suffixes: T rows, H query heads, K KV heads, D head dim.
"""

import functools

import torch
from torch import Tensor

from csps.attention.backends import DecodeRows, Kernels
from csps.attention.kv import KVStore
from csps.attention.shards import DecodeBatch
from csps.attention.ship import QueryExchange
from csps.parallel.collectives import SequenceComm


class QueryShip:
    """The `Attend` of one decode step. Ranks that share no sequence do not speak.

    `attend`: own rows; `away`: those that are shipped, and what answers the peers' rows.
    """

    def __init__(self, attend: DecodeRows, away: tuple[QueryExchange, DecodeRows] | None) -> None:
        self._attend, self._away = attend, away

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """o [T, H, D] in q's dtype; the new K and V are stored already. T may be 0."""
        attend_here = functools.partial(self._attend, layer, q_THD)
        if self._away is not None:
            exchange, answer = self._away
            return exchange(q_THD, attend_here, functools.partial(answer, layer))
        o_THD = q_THD.new_empty(q_THD.shape)
        attend_here(o_THD, o_THD.new_empty(o_THD.shape[:2], dtype=torch.float32))
        return o_THD


def query_ship(
    batch: DecodeBatch, store: KVStore, comm: SequenceComm, kernels: Kernels
) -> QueryShip:
    """Of the rows of `batch`."""
    attend = kernels.paged_decode(store, batch.shards)
    if not batch.shipped and not batch.answered:
        return QueryShip(attend, None)
    asked = [shards for peer in batch.answered.values() for shards in peer]
    exchange = QueryExchange(
        comm,
        kernels.merge,
        shipped=batch.shipped,
        num_asked={peer: len(shards) for peer, shards in batch.answered.items()},
        num_rows=len(batch.shards),
        device=batch.slots_T.device,
    )
    return QueryShip(attend, (exchange, kernels.paged_decode(store, asked)))
