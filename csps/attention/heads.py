"""Attention where KV is sharded by head: this rank's heads of every token, nothing to ask for.

Chunks of prompts and single tokens alike: new rows attend to each other and to what was there.
Suffixes: T rows, H query heads, K KV heads, D head dim.
"""

import torch
from torch import Tensor

from csps.attention.backends import Partial
from csps.attention.kv import KVStore
from csps.attention.merge import merge_into
from csps.attention.runs import attend_runs
from csps.attention.shards import HeadsBatch, Run


class HeadsAttention:
    """The `Attend` of one step over this rank's heads (there may be none) of all its tokens."""

    def __init__(self, batch: HeadsBatch, store: KVStore, partial: Partial) -> None:
        self._batch, self._store, self._partial = batch, store, partial

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Write the new K and V, then attend; o [T, H, D] in q's dtype."""
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        if not q_THD.shape[1]:
            return out_THD
        self._store.write(layer, self._batch.slots_T, k_TKD, v_TKD)
        for seq in self._batch.sequences:
            rows = slice(seq.row, seq.row + seq.num_tokens)
            out_THD[rows] = self._attend(layer, seq.runs, q_THD[rows], k_TKD[rows], v_TKD[rows])
        return out_THD

    def _attend(
        self, layer: int, runs: tuple[Run, ...], q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor
    ) -> Tensor:
        """New rows of one sequence (see HeadsSequence)."""
        if len(q_THD) == 1:
            return attend_runs(self._partial, self._store, layer, q_THD, runs)[0]
        o_THD, lse_TH = self._partial(q_THD, k_TKD, v_TKD, causal=True)
        if runs:
            o_THD = o_THD.float()
            merge_into(o_THD, lse_TH, *attend_runs(self._partial, self._store, layer, q_THD, runs))
        return o_THD
