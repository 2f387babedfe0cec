"""Recall of a choice, measured on probes, and what each KV head does about it.

A probe is a random row of a tile (one per stratum, as samplers say), so the mean over probes is
an unbiased estimate of the mean over all rows that took no part in the choice; its variance is
estimated by s^2 / n, which for stratified draws errs on the wide side. Each tile has two: the
first ones decide whether the head falls back, the second ones are reported. Were they the same,
heads whose probes happened to be lucky would stay sparse, and what is reported would flatter.

Suffixes: K KV heads, N tiles, E probes, J blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from torch import Tensor

from csps.core.attention import CsaConfig, HeadReport

# Fewer rows say nothing worth a 95% interval.
MIN_PROBES = 8


class Outcome(IntEnum):
    """What a KV head runs with in one layer; also the index of its gamma's choice."""

    ASKED = 0
    WIDENED = 1
    DENSE = 2


def widened(gamma: float) -> float:
    """The second try: a quarter of the mass that the first one gave up."""
    return 1.0 - (1.0 - gamma) / 4.0


def recall_of(probe_mass_KNEJ: Tensor, keep_KNJ: Tensor) -> Tensor:
    """Share of each probe's exact mass in kept blocks: fp32 [K, N, E], at most 1."""
    return (probe_mass_KNEJ * keep_KNJ.unsqueeze(2)).sum(-1).clamp_max_(1.0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The same on every rank: it follows from what all ranks sent."""

    outcomes: tuple[Outcome, ...]  # by KV head
    reports: tuple[HeadReport, ...]
    recalls: np.ndarray  # every reported probe's, of the final choice


def judge(
    kept_CK: np.ndarray,
    causal_pairs: int,
    recalls_CKNE: np.ndarray,
    gammas: Sequence[float],
    config: CsaConfig,
    *,
    layer: int,
    first_head: int,
    falls_back: bool,
) -> Verdict:
    """Choose between the choices C (asked, widened) by KV head.

    `kept_CK`: pairs each would keep, `recalls_CKNE`: recall of all ranks' probes. A choice is
    good if the lower end of its recall's interval and its 5% quantile reach their floors, and it
    is worth it: it keeps no more than config.max_density. If none is, or there are too few
    probes to know, the head runs dense. Without `falls_back` the first choice stands.
    """
    outcomes, reports, recalls = [], [], []
    num_choices, num_heads, _, num_probes = recalls_CKNE.shape
    for head in range(num_heads):

        def report(choice: int, probe: int, head: int = head) -> HeadReport:
            recall = recalls_CKNE[choice, head, :, probe] if num_probes else np.ones(0)
            kept, gamma = kept_CK[choice, head], gammas[choice]
            return _report(kept, causal_pairs, recall, gamma, layer, first_head + head)

        options = [report(choice, 0) for choice in range(num_choices)]
        outcome = _outcome(options, config) if falls_back else Outcome.ASKED
        outcomes.append(outcome)
        if outcome is Outcome.DENSE:
            recalls.append(np.ones(recalls_CKNE.shape[2]))
            reports.append(
                _report(causal_pairs, causal_pairs, recalls[-1], 1.0, layer, first_head + head)
            )
        else:
            recalls.append(recalls_CKNE[outcome, head, :, -1])
            reports.append(report(outcome, -1))
    return Verdict(tuple(outcomes), tuple(reports), np.concatenate(recalls))


def _outcome(options: Sequence[HeadReport], config: CsaConfig) -> Outcome:
    for outcome, option in zip((Outcome.ASKED, Outcome.WIDENED), options, strict=True):
        if option.gamma >= 1.0 or option.density > config.max_density:
            return Outcome.DENSE
        if option.num_probes >= MIN_PROBES and _is_good(option, config):
            return outcome
    return Outcome.DENSE


def _is_good(option: HeadReport, config: CsaConfig) -> bool:
    return option.recall_low >= config.min_recall and option.recall_p5 >= config.min_recall_p5


def _report(
    kept: float, causal: int, recall_X: np.ndarray, gamma: float, layer: int, head: int
) -> HeadReport:
    count = recall_X.size
    return HeadReport(
        layer=layer,
        head=head,
        gamma=gamma,
        density=float(kept / causal) if causal else 0.0,
        num_probes=count,
        recall_mean=float(recall_X.mean()) if count else 1.0,
        recall_var=float(recall_X.var(ddof=1)) / count if count > 1 else 0.0,
        recall_p5=float(np.quantile(recall_X, 0.05)) if count else 1.0,
        recall_min=float(recall_X.min()) if count else 1.0,
    )
