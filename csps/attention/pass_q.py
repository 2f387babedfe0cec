"""Exact prefill of few new tokens behind much KV on other ranks: queries travel, KV stays.

So it is behind a cached prefix, and in the late stages of a very long prompt. Each rank ships
the queries of its rows to the ranks that hold keys they see, and merges the partial outputs that
come back, as decode does. Both ways, the ring and this, are exact; bytes decide.

Suffixes: T rows of the batch, N shipped rows, H query heads, D head dim.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from csps.attention.backends import Kernels
from csps.attention.kv import KVStore
from csps.attention.merge import merge_into
from csps.attention.runs import attend_runs, first_tokens
from csps.attention.shards import PrefillSequence, QueryRun
from csps.attention.ship import QueryExchange
from csps.attention.transfer import KVShape
from csps.parallel.collectives import SequenceComm


def ships_queries(seq: PrefillSequence, shape: KVShape) -> bool:
    """Whether a sequence's queries and partial outputs are fewer bytes than its KV round the ring.

    The same on every rank.
    """
    element_bytes = shape.dtype.itemsize
    shipped = sum(
        run.num_tokens * sum(seen > 0 for peer, seen in enumerate(run.visible) if peer != rank)
        for rank, runs in enumerate(seq.queries_by_rank)
        for run in runs
    )
    row_bytes = shape.group_size * (2 * shape.head_dim * element_bytes + 4)
    ring_tokens = (len(seq.shard_tokens) - 1) * sum(seq.shard_tokens)
    return (
        seq.spans_ranks and shipped * row_bytes < ring_tokens * 2 * shape.head_dim * element_bytes
    )


class PassQ:
    """Some dense sequences of one prefill step; collective over their ranks."""

    def __init__(
        self,
        sequences: Sequence[PrefillSequence],
        store: KVStore,
        comm: SequenceComm,
        kernels: Kernels,
        device: torch.device,
    ) -> None:
        self._sequences, self._store, self._comm = sequences, store, comm
        self._partial = kernels.partial
        self._peers = [peer for peer in range(comm.size) if peer != comm.rank]
        self._num_rows = max(
            (run.row + run.num_tokens for seq in sequences for run in seq.queries), default=0
        )
        self._exchange = QueryExchange(
            comm,
            kernels.merge,
            shipped={peer: self._rows(peer) for peer in self._peers},
            num_asked={peer: self._num_asked(peer) for peer in self._peers},
            num_rows=self._num_rows,
            device=device,
        )

    def __call__(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, out_THD: Tensor
    ) -> None:
        """Fill the sequences' rows of `out_THD`. Their new K and V are in the store already."""

        def attend_here(acc_THD: Tensor, lse_TH: Tensor) -> None:
            for seq in self._sequences:
                for run in seq.queries:
                    self._attend_here(layer, seq, run, q_THD, k_TKD, v_TKD, acc_THD, lse_TH)

        answer = functools.partial(self._answer, layer)
        merged_THD = self._exchange(q_THD[: self._num_rows], attend_here, answer)
        for seq in self._sequences:
            for run in seq.queries:
                rows = slice(run.row, run.row + run.num_tokens)
                out_THD[rows] = merged_THD[rows]

    def _attend_here(
        self,
        layer: int,
        seq: PrefillSequence,
        run: QueryRun,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        acc_THD: Tensor,
        lse_TH: Tensor,
    ) -> None:
        """The run's own keys, then those of this rank's shard before them."""
        rows = slice(run.row, run.row + run.num_tokens)
        acc_THD[rows], lse_TH[rows] = self._partial(
            q_THD[rows], k_TKD[rows], v_TKD[rows], causal=True
        )
        before = first_tokens(seq.runs, run.visible[self._comm.rank])
        if before:
            part = attend_runs(self._partial, self._store, layer, q_THD[rows], before)
            merge_into(acc_THD[rows], lse_TH[rows], *part)

    def _answer(self, layer: int, q_NHD: Tensor, o_NHD: Tensor, lse_NH: Tensor) -> None:
        """Partial outputs of all peers' rows over this rank's shards."""
        at = 0
        for peer in self._peers:
            for seq in self._sequences:
                for run in self._asking(seq, peer, self._comm.rank):
                    rows = slice(at, at + run.num_tokens)
                    seen = first_tokens(seq.runs, run.visible[self._comm.rank])
                    o_NHD[rows], lse_NH[rows] = attend_runs(
                        self._partial, self._store, layer, q_NHD[rows], seen
                    )
                    at = rows.stop

    def _rows(self, peer: int) -> np.ndarray:
        """Own rows that see keys of `peer`, int64, in the order it answers."""
        rows = [
            np.arange(run.row, run.row + run.num_tokens)
            for seq in self._sequences
            for run in self._asking(seq, self._comm.rank, peer)
        ]
        return np.concatenate([np.empty(0, np.int64), *rows])

    def _num_asked(self, peer: int) -> int:
        return sum(
            run.num_tokens
            for seq in self._sequences
            for run in self._asking(seq, peer, self._comm.rank)
        )

    @staticmethod
    def _asking(seq: PrefillSequence, rank: int, owner: int) -> list[QueryRun]:
        return [run for run in seq.queries_by_rank[rank] if run.visible[owner]]
