"""Draw next tokens from logits. Repeatable: a draw depends on seed and position alone,
not on the batch, the rank or how often the sequence was preempted.

Suffixes: N rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csps.core.plan import SampledToken
from csps.core.request import SamplingParams


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
    """One token per row of fp32 logits. Greedy where temperature is 0."""
    scores_NV = logits_NV
    if any(draw.masked_ids for draw in draws):
        scores_NV = logits_NV.clone()
        for row, draw in enumerate(draws):
            scores_NV[row, draw.masked_ids] = -torch.inf
    chosen = scores_NV.argmax(dim=-1).tolist()
    return [
        _finish(logits_NV[row], draw, _draw(scores_NV[row], draw, chosen[row]))
        for row, draw in enumerate(draws)
    ]


def _draw(scores_V: Tensor, draw: Draw, greedy: int) -> int:
    params = draw.params
    if params.temperature == 0.0:
        return greedy
    # Sorting the candidates makes top-k and top-p prefixes of one list.
    num_candidates = min(params.top_k or scores_V.numel(), scores_V.numel())
    scores, ids = torch.topk(scores_V / params.temperature, num_candidates)
    probabilities = torch.softmax(scores, dim=-1)
    if params.top_p < 1.0:
        # Keep a token while the mass before it is short of top_p: the first always stays.
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = torch.where(before < params.top_p, probabilities, 0.0)
    generator = torch.Generator(device=scores_V.device)
    generator.manual_seed(((params.seed or 0) * 0x9E3779B1 + draw.position) % 2**63)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def _finish(logits_V: Tensor, draw: Draw, token_id: int) -> SampledToken:
    if draw.params.logprobs is None:
        return SampledToken(draw.seq_id, token_id)
    logprobs_V = torch.log_softmax(logits_V, dim=-1)
    top = torch.topk(logprobs_V, draw.params.logprobs)
    return SampledToken(
        seq_id=draw.seq_id,
        token_id=token_id,
        logprob=float(logprobs_V[token_id]),
        top_ids=tuple(top.indices.tolist()),
        top_logprobs=tuple(top.values.tolist()),
    )
