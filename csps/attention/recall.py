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
from typing import NamedTuple

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
    num_choices, num_heads, num_tiles, num_probes = recalls_CKNE.shape
    if not num_probes:
        recalls_CKNE = np.empty((num_choices, num_heads, 0, 1))
    recall = _statistics(recalls_CKNE)
    outcomes, reports, recalls = [], [], []
    for head in range(num_heads):

        def report(gamma: float, kept: float, of: Recall, head: int = head) -> HeadReport:
            density = float(kept / causal_pairs) if causal_pairs else 0.0
            return HeadReport(layer, first_head + head, gamma, density, *of)

        # The first probes decide, the last ones are reported.
        options = [
            report(gamma, kept_CK[choice, head], recall[choice][head][0])
            for choice, gamma in enumerate(gammas)
        ]
        outcome = _outcome(options, config) if falls_back else Outcome.ASKED
        outcomes.append(outcome)
        if outcome is Outcome.DENSE:
            recalls.append(np.ones(num_tiles))
            reports.append(report(1.0, causal_pairs, Recall(num_tiles, 1.0, 0.0, 1.0, 1.0)))
        else:
            recalls.append(recalls_CKNE[outcome, head, :, -1])
            kept, of = kept_CK[outcome, head], recall[outcome][head][-1]
            reports.append(report(gammas[outcome], kept, of))
    return Verdict(tuple(outcomes), tuple(reports), np.concatenate(recalls))


class Recall(NamedTuple):
    """As in `HeadReport`."""

    num_probes: int
    mean: float
    var: float
    p5: float
    least: float


def _statistics(recalls_CKNE: np.ndarray) -> list[list[list[Recall]]]:
    """By choice, KV head and probe. All at once: one at a time numpy takes 0.1 ms for each."""
    num_choices, num_heads, count, num_probes = recalls_CKNE.shape
    recalls_XN = np.ascontiguousarray(recalls_CKNE.transpose(0, 1, 3, 2))
    recalls_XN = recalls_XN.reshape(num_choices * num_heads * num_probes, count)
    if not count:
        flat = [Recall(0, 1.0, 0.0, 1.0, 1.0)] * len(recalls_XN)
    else:
        var_X = recalls_XN.var(1, ddof=1) if count > 1 else np.zeros(len(recalls_XN))
        p5_X = np.quantile(recalls_XN, 0.05, 1)
        columns = recalls_XN.mean(1), var_X, p5_X, recalls_XN.min(1)
        flat = [
            Recall(count, mean, var / count, p5, least)
            for mean, var, p5, least in zip(*(x.tolist() for x in columns), strict=True)
        ]
    by_probe = [flat[at : at + num_probes] for at in range(0, len(flat), num_probes)]
    return [by_probe[c * num_heads : (c + 1) * num_heads] for c in range(num_choices)]


def _outcome(options: Sequence[HeadReport], config: CsaConfig) -> Outcome:
    for outcome, option in zip((Outcome.ASKED, Outcome.WIDENED), options, strict=True):
        if option.gamma >= 1.0 or option.density > config.max_density:
            return Outcome.DENSE
        if option.num_probes >= MIN_PROBES and _is_good(option, config):
            return outcome
    return Outcome.DENSE


def _is_good(option: HeadReport, config: CsaConfig) -> bool:
    return option.recall_low >= config.min_recall and option.recall_p5 >= config.min_recall_p5
