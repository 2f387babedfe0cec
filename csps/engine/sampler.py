"""Draw next tokens from logits, on their device. Repeatable: a draw depends on seed and position
alone, not on the batch, the rank or how often the sequence was preempted.

Suffixes: N rows, V vocabulary, M rows of one kind, C candidates, L likeliest tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from csps.core.plan import SampledToken
from csps.core.request import SamplingParams
from csps.parallel.upload import upload


@dataclass(frozen=True, slots=True)
class Draw:
    """One row to draw from; `params.seed` is set where the temperature is not 0.

    `position` is the drawn token's; `num_drawn` counts the tokens drawn before it.
    """

    seq_id: int
    params: SamplingParams
    position: int
    num_drawn: int
    eos_ids: frozenset[int]

    @property
    def masked_ids(self) -> list[int]:
        """Tokens that would end the output too early."""
        if self.num_drawn >= self.params.min_tokens:
            return []
        stops = set(self.params.stop_token_ids)
        return sorted(stops | (set() if self.params.ignore_eos else self.eos_ids))


def sample(logits_NV: Tensor, draws: Sequence[Draw]) -> list[SampledToken]:
    """One token per row of fp32 logits. Greedy where temperature is 0.

    The host waits for the device once, when all is drawn.
    """
    scores_NV = _masked(logits_NV, draws)
    chosen_N = scores_NV.argmax(dim=-1)
    vocab_size = logits_NV.shape[1]
    num_candidates = [
        min(draw.params.top_k or vocab_size, vocab_size) if draw.params.temperature else None
        for draw in draws
    ]
    for count, rows in _alike(num_candidates):
        rows_M = _index(rows, logits_NV)
        chosen_N[rows_M] = _draw(scores_NV[rows_M], [draws[row] for row in rows], count)
    return _results(logits_NV, chosen_N, draws)


def _alike(counts: Iterable[int | None]) -> list[tuple[int, np.ndarray]]:
    """Rows of each count, int64; those of None left out."""
    rows: dict[int, list[int]] = {}
    for row, count in enumerate(counts):
        if count is not None:
            rows.setdefault(count, []).append(row)
    return [(count, np.array(same)) for count, same in rows.items()]


def _index(rows: np.ndarray, logits_NV: Tensor) -> Tensor | slice:
    """The rows as an index; that of all rows takes no copy."""
    if len(rows) == len(logits_NV):
        return slice(None)
    return upload([rows], logits_NV.device)[0]


def _masked(logits_NV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The logits, -inf for the tokens that a row may not end with yet."""
    masked = [(row, token) for row, draw in enumerate(draws) for token in draw.masked_ids]
    if not masked:
        return logits_NV
    at = upload([np.array(column) for column in zip(*masked, strict=True)], logits_NV.device)
    scores_NV = logits_NV.clone()
    # Filled, not assigned: a number of the host's would be copied to the device, and waited for.
    minus_inf = scores_NV.new_full((len(masked),), -torch.inf)
    return scores_NV.index_put_(tuple(at), minus_inf)


def _draw(scores_MV: Tensor, draws: Sequence[Draw], num_candidates: int) -> Tensor:
    """Token ids [M], each from the likeliest `num_candidates`, cut to its top_p."""
    params = [draw.params for draw in draws]
    # What is uploaded has 8 bytes; not less than 1 means all, whatever a sum is rounded to.
    top_p = np.array([p.top_p if p.top_p < 1.0 else np.inf for p in params])
    temperature = np.array([p.temperature for p in params])
    temperature_M1, top_p_M1 = (
        column.float().unsqueeze(1) for column in upload([temperature, top_p], scores_MV.device)
    )
    # Sorting the candidates makes top-k and top-p prefixes of one list.
    scores_MC, ids_MC = torch.topk(scores_MV / temperature_M1, num_candidates)
    shares_MC = torch.softmax(scores_MC, dim=-1)
    if (top_p < 1.0).any():
        # Keep a token while the mass before it is short of top_p: the first always stays.
        before_MC = shares_MC.cumsum(dim=-1).sub_(shares_MC)
        shares_MC.masked_fill_(before_MC >= top_p_M1, 0.0)
    # The first of exponential clocks to ring, each at the rate of a token's share.
    first_M1 = shares_MC.div_(_clocks(shares_MC, draws)).argmax(dim=-1, keepdim=True)
    return ids_MC.gather(1, first_M1)[:, 0]


def _clocks(like_MC: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Exponential noise, a row by seed and position."""
    noise_MC = torch.empty_like(like_MC)
    generator = torch.Generator(device=like_MC.device)
    for noise_C, draw in zip(noise_MC, draws, strict=True):
        generator.manual_seed(((draw.params.seed or 0) * 0x9E3779B1 + draw.position) % 2**63)
        noise_C.exponential_(generator=generator)
    return noise_MC


def _results(logits_NV: Tensor, chosen_N: Tensor, draws: Sequence[Draw]) -> list[SampledToken]:
    """The tokens with the log-probabilities that are wanted, in one copy to the host."""
    wanted = _alike(draw.params.logprobs for draw in draws)
    # Double holds token ids and fp32 exactly.
    reports = [chosen_N.double()]
    for count, rows in wanted:
        rows_M = _index(rows, logits_NV)
        logprobs_MV = torch.log_softmax(logits_NV[rows_M], dim=-1)
        top = torch.topk(logprobs_MV, count)
        own_M1 = logprobs_MV.gather(1, chosen_N[rows_M].unsqueeze(1))
        report = torch.cat((own_M1.double(), top.indices.double(), top.values.double()), dim=1)
        reports.append(report.flatten())
    numbers = iter(torch.cat(reports).tolist())
    sampled = [SampledToken(draw.seq_id, int(next(numbers))) for draw in draws]
    for count, rows in wanted:
        for row in rows:
            sampled[row] = SampledToken(
                seq_id=sampled[row].seq_id,
                token_id=sampled[row].token_id,
                logprob=next(numbers),
                top_ids=tuple(int(next(numbers)) for _ in range(count)),
                top_logprobs=tuple(next(numbers) for _ in range(count)),
            )
    return sampled
