"""Attention where KV is sharded by head: this rank's heads of every token, nothing to ask for.

Chunks of prompts and single tokens alike: new rows attend to each other and to what was there.
Suffixes: T rows, H query heads, K KV heads, D head dim.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from csps.attention.backends import DecodeRows, Kernels, Partial
from csps.attention.kv import KVStore
from csps.attention.merge import merge_into
from csps.attention.runs import attend_runs
from csps.attention.shards import HeadsBatch, HeadsSequence, Run


class HeadsAttention:
    """The `Attend` of one step over this rank's heads (there may be none) of all its tokens.

    `single`: rows of sequences with one new token each; `longer`: the other sequences.
    """

    def __init__(
        self,
        single: Sequence[tuple[slice, DecodeRows]],
        longer: Sequence[HeadsSequence],
        store: KVStore,
        partial: Partial,
    ) -> None:
        self._single, self._longer = single, longer
        self._store, self._partial = store, partial

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """o [T, H, D] in q's dtype; the new K and V are stored already."""
        out_THD = q_THD.new_empty(q_THD.shape)
        if not q_THD.shape[1]:
            return out_THD
        for rows, attend in self._single:
            q_NHD = q_THD[rows]
            lse_NH = q_NHD.new_empty(q_NHD.shape[:2], dtype=torch.float32)
            attend(layer, q_NHD, out_THD[rows], lse_NH)
        for seq in self._longer:
            rows = slice(seq.row, seq.row + seq.num_tokens)
            out_THD[rows] = self._attend(layer, seq.runs, q_THD[rows], k_TKD[rows], v_TKD[rows])
        return out_THD

    def _attend(
        self, layer: int, runs: tuple[Run, ...], q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor
    ) -> Tensor:
        """New rows of one sequence (see HeadsSequence), two at least."""
        o_THD, lse_TH = self._partial(q_THD, k_TKD, v_TKD, causal=True)
        if runs:
            o_THD = o_THD.float()
            merge_into(o_THD, lse_TH, *attend_runs(self._partial, self._store, layer, q_THD, runs))
        return o_THD


def heads_attention(batch: HeadsBatch, store: KVStore, kernels: Kernels) -> HeadsAttention:
    """Of the rows of `batch`."""
    # Sequences of one new token that follow each other attend together.
    single: list[tuple[slice, DecodeRows]] = []
    longer: list[HeadsSequence] = []
    for is_single, group in groupby(batch.sequences, lambda seq: seq.num_tokens == 1):
        sequences = list(group)
        if is_single:
            rows = slice(sequences[0].row, sequences[-1].row + 1)
            attend = kernels.paged_decode(store, [seq.runs for seq in sequences])
            single.append((rows, attend))
        else:
            longer += sequences
    return HeadsAttention(single, longer, store, kernels.partial)
