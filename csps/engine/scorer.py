"""Log-probabilities of given tokens, from the rows that come before them.

Suffixes: T rows of the batch, N rows of a chunk, E hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from csps.core.plan import ScoredTokens
from csps.engine.batch import ScoreRun

# fp32 logits [N, V] of rows of the residual stream; None where another rank has them.
Logits = Callable[[Tensor], Tensor | None]

# Rows whose fp32 logits exist at a time: 24 MiB of them with a vocabulary of 49k.
CHUNK_ROWS = 128


def score(logits: Logits, hidden_TE: Tensor, runs: Sequence[ScoreRun]) -> tuple[ScoredTokens, ...]:
    """One ScoredTokens a run, or none where `logits` are another rank's.

    `hidden_TE` is what the model's `forward` returned.
    """
    scored = []
    for run in runs:
        logprobs = _logprobs(logits, hidden_TE, run)
        if logprobs is not None:
            scored.append(ScoredTokens(run.seq_id, run.position, tuple(logprobs)))
    return tuple(scored)


def _logprobs(logits: Logits, hidden_TE: Tensor, run: ScoreRun) -> list[float] | None:
    rows_TE = hidden_TE[run.row : run.row + len(run.token_ids)]
    targets_T = torch.tensor(run.token_ids, dtype=torch.int64, device=hidden_TE.device)
    logprobs: list[float] | None = []
    chunks = zip(rows_TE.split(CHUNK_ROWS), targets_T.split(CHUNK_ROWS), strict=True)
    for rows_NE, targets_N in chunks:
        logits_NV = logits(rows_NE)
        if logits_NV is None:
            logprobs = None  # and go on: every rank takes part in every chunk
        elif logprobs is not None:
            chosen_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
            logprobs += (chosen_N - logits_NV.logsumexp(dim=-1)).tolist()
    return logprobs
