"""Log-probabilities of given tokens, from the rows that come before them.

Suffixes: T rows of the batch, N rows of a chunk, E hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from csps.core.plan import ScoredTokens
from csps.engine.batch import ScoreRun
from csps.parallel.upload import upload

# fp32 logits [N, V] of rows of the residual stream; None where another rank has them.
Logits = Callable[[Tensor], Tensor | None]

# Rows whose fp32 logits exist at a time: 24 MiB of them with a vocabulary of 49k.
CHUNK_ROWS = 128


def score(logits: Logits, hidden_TE: Tensor, runs: Sequence[ScoreRun]) -> tuple[ScoredTokens, ...]:
    """One ScoredTokens a run, or none where `logits` are another rank's.

    `hidden_TE` is what the model's `forward` returned. The host waits for the device once.
    """
    targets = upload([np.array(run.token_ids) for run in runs], hidden_TE.device) if runs else []
    parts = [
        part_N
        for run, targets_T in zip(runs, targets, strict=True)
        for part_N in _logprobs(logits, hidden_TE[run.row : run.row + len(targets_T)], targets_T)
    ]
    if not parts:
        return ()
    numbers = iter(torch.cat(parts).tolist())
    return tuple(
        ScoredTokens(run.seq_id, run.position, tuple(islice(numbers, len(run.token_ids))))
        for run in runs
    )


def _logprobs(logits: Logits, rows_TE: Tensor, targets_T: Tensor) -> Iterator[Tensor]:
    """fp32 [N] of each chunk; every rank takes part in every chunk."""
    chunks = zip(rows_TE.split(CHUNK_ROWS), targets_T.split(CHUNK_ROWS), strict=True)
    for rows_NE, targets_N in chunks:
        logits_NV = logits(rows_NE)
        if logits_NV is not None:
            chosen_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
            yield chosen_N - logits_NV.logsumexp(dim=-1)
