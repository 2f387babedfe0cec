"""Attention of a few rows over one shard, read in place where it lies in few runs.

Suffixes: N rows, H query heads, D head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from csps.attention.backends import DecodeRows, Partial
from csps.attention.kv import KVStore
from csps.attention.merge import merge_into
from csps.attention.shards import Run

# Up to this many runs a shard is read in place and merged; beyond, one gather is cheaper.
MAX_RUNS_IN_PLACE = 4


def first_tokens(runs: tuple[Run, ...], num_tokens: int) -> tuple[Run, ...]:
    """The runs of the first `num_tokens` tokens of a shard."""
    taken: list[Run] = []
    for run in runs:
        if num_tokens <= 0:
            break
        taken.append(Run(run.first_slot, min(run.num_tokens, num_tokens)))
        num_tokens -= run.num_tokens
    return tuple(taken)


def attend_runs(
    partial: Partial, store: KVStore, layer: int, q_NHD: Tensor, runs: tuple[Run, ...]
) -> tuple[Tensor, Tensor]:
    """(o [N, H, D] in q's dtype or fp32, lse [N, H] fp32) over all keys of `runs`, one at least."""
    if len(runs) == 1 or len(runs) > MAX_RUNS_IN_PLACE:
        return partial(q_NHD, *store.gather(layer, runs), causal=False)
    o_NHD, lse_NH = partial(q_NHD, *store.view(layer, runs[0]), causal=False)
    acc_NHD = o_NHD.float()
    for run in runs[1:]:
        merge_into(acc_NHD, lse_NH, *partial(q_NHD, *store.view(layer, run), causal=False))
    return acc_NHD, lse_NH


class RowByRow:
    """`PagedDecode` with one call of `partial` per row and run."""

    def __init__(self, partial: Partial) -> None:
        self._partial = partial

    def __call__(self, store: KVStore, shards: Sequence[tuple[Run, ...]]) -> DecodeRows:
        def attend(layer: int, q_NHD: Tensor, o_NHD: Tensor, lse_NH: Tensor) -> None:
            for row, runs in enumerate(shards):
                one = slice(row, row + 1)
                if runs:
                    o_NHD[one], lse_NH[one] = attend_runs(
                        self._partial, store, layer, q_NHD[one], runs
                    )
                else:
                    o_NHD[one], lse_NH[one] = 0.0, -torch.inf

        return attend
