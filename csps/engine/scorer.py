"""Log-probabilities of given tokens, from the rows that come before them.

Suffixes: T rows of the batch, N rows of a chunk, E hidden size, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from csps.core.plan import ScoredTokens
from csps.engine.batch import ScoreRun
from csps.model.llama import Llama

# Rows whose fp32 logits exist at a time: 24 MiB of them with a vocabulary of 49k.
CHUNK_ROWS = 128


def score(model: Llama, hidden_TE: Tensor, runs: Sequence[ScoreRun]) -> tuple[ScoredTokens, ...]:
    """One ScoredTokens a run; `hidden_TE` is what the model's `forward` returned."""
    return tuple(
        ScoredTokens(run.seq_id, run.position, tuple(_logprobs(model, hidden_TE, run)))
        for run in runs
    )


def _logprobs(model: Llama, hidden_TE: Tensor, run: ScoreRun) -> list[float]:
    rows_TE = hidden_TE[run.row : run.row + len(run.token_ids)]
    targets_T = torch.tensor(run.token_ids, dtype=torch.int64, device=hidden_TE.device)
    logprobs: list[float] = []
    chunks = zip(rows_TE.split(CHUNK_ROWS), targets_T.split(CHUNK_ROWS), strict=True)
    for rows_NE, targets_N in chunks:
        logits_NV = model.logits(rows_NE)
        chosen_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
        logprobs += (chosen_N - logits_NV.logsumexp(dim=-1)).tolist()
    return logprobs
