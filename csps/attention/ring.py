"""Exact prefill of sequences that span ranks: a ring that passes KV, never queries.

Each rank holds zigzag slices of the step's tokens and the shards of earlier steps. Shards
travel once round the ring; while one is under way the rank attends to the one it has
(Ring Attention, arXiv 2310.01889; zigzag as in Llama 3, arXiv 2407.21783, section 3.3.2).
Slices are runs of positions, so what a run of queries sees of a shard is a prefix of it,
and only a run's own keys need a causal mask.

Suffixes: T rows, H query heads, K KV heads, D head dim, L tokens of a shard.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from csps.attention.backends import Partial
from csps.attention.kv import KVStore
from csps.attention.merge import merge_into
from csps.attention.shards import PrefillSequence, QueryRun
from csps.parallel.collectives import SequenceComm


class RingPrefill:
    """Dense sequences of one prefill step. Collective where one of them spans ranks."""

    def __init__(
        self,
        sequences: Sequence[PrefillSequence],
        store: KVStore,
        comm: SequenceComm,
        partial: Partial,
    ) -> None:
        self._store = store
        self._comm = comm
        self._partial = partial
        self._spanning = [seq for seq in sequences if seq.spans_ranks]
        self._local = [seq for seq in sequences if not seq.spans_ranks]

    def __call__(self, layer: int, q_THD: Tensor, num_kv_heads: int) -> Tensor:
        """o [T, H, D] in q's dtype, rows of other sequences undefined.

        The sequences' K and V are in the store already.
        """
        acc_THD = torch.empty_like(q_THD, dtype=torch.float32)
        lse_TH = torch.empty(q_THD.shape[:2], dtype=torch.float32, device=q_THD.device)
        if self._spanning:
            self._ring(layer, q_THD, num_kv_heads, acc_THD, lse_TH)
        for seq in self._local:
            if seq.queries:
                k_LKD, v_LKD = self._store.gather(layer, seq.runs)
                self._attend(seq, self._comm.rank, q_THD, k_LKD, v_LKD, acc_THD, lse_TH)
        return acc_THD.to(q_THD.dtype)

    def _ring(
        self, layer: int, q_THD: Tensor, num_kv_heads: int, acc_THD: Tensor, lse_TH: Tensor
    ) -> None:
        comm = self._comm
        held = self._own_shards(layer, q_THD, num_kv_heads)
        for hop in range(comm.size):
            owner = (comm.rank - hop) % comm.size
            handle = None
            if hop < comm.size - 1:
                incoming = self._buffer((owner - 1) % comm.size, q_THD, num_kv_heads)
                handle = comm.ring_shift("kv", held, incoming)
            self._attend_shards(owner, held, q_THD, acc_THD, lse_TH)
            if handle is not None:
                handle.wait()
                held = incoming

    def _attend_shards(
        self, owner: int, held: Tensor, q_THD: Tensor, acc_THD: Tensor, lse_TH: Tensor
    ) -> None:
        """Attend to `owner`'s shards of all spanning sequences (see `_buffer`)."""
        start = 0
        for seq in self._spanning:
            stop = start + seq.shard_tokens[owner]
            k_LKD, v_LKD = held[:, :, start:stop].transpose(1, 2)
            self._attend(seq, owner, q_THD, k_LKD, v_LKD, acc_THD, lse_TH)
            start = stop

    def _attend(
        self,
        seq: PrefillSequence,
        owner: int,
        q_THD: Tensor,
        k_LKD: Tensor,
        v_LKD: Tensor,
        acc_THD: Tensor,
        lse_TH: Tensor,
    ) -> None:
        if owner == self._comm.rank:
            self._attend_own(seq, q_THD, k_LKD, v_LKD, acc_THD, lse_TH)
        for visible, runs in groupby(seq.queries, key=lambda run: run.visible[owner]):
            if visible:
                rows = _rows(list(runs))
                o_THD, part_TH = self._partial(
                    q_THD[rows], k_LKD[:visible], v_LKD[:visible], causal=False
                )
                merge_into(acc_THD[rows], lse_TH[rows], o_THD, part_TH)

    def _attend_own(
        self,
        seq: PrefillSequence,
        q_THD: Tensor,
        k_LKD: Tensor,
        v_LKD: Tensor,
        acc_THD: Tensor,
        lse_TH: Tensor,
    ) -> None:
        """The diagonal: each run over its own keys. First of all, so it fills the accumulators."""
        for run in seq.queries:
            rows = _rows([run])
            visible = run.visible[self._comm.rank]
            own = slice(visible, visible + run.num_tokens)
            acc_THD[rows], lse_TH[rows] = self._partial(
                q_THD[rows], k_LKD[own], v_LKD[own], causal=True
            )

    def _own_shards(self, layer: int, like: Tensor, num_kv_heads: int) -> Tensor:
        held = self._buffer(self._comm.rank, like, num_kv_heads)
        start = 0
        for seq in self._spanning:
            for run in seq.runs:
                stop = start + run.num_tokens
                k_LKD, v_LKD = self._store.view(layer, run)
                held[0, :, start:stop] = k_LKD.transpose(0, 1)
                held[1, :, start:stop] = v_LKD.transpose(0, 1)
                start = stop
        return held

    def _buffer(self, owner: int, like: Tensor, num_kv_heads: int) -> Tensor:
        """[2 (K and V), K, sum of L, D] for the spanning shards of `owner`, head-major."""
        num_tokens = sum(seq.shard_tokens[owner] for seq in self._spanning)
        return like.new_empty(2, num_kv_heads, num_tokens, like.shape[2])


def _rows(runs: list[QueryRun]) -> slice:
    """Rows of neighbouring runs: a sequence's runs lie one behind the other in the batch."""
    return slice(runs[0].row, runs[-1].row + runs[-1].num_tokens)
