"""Tokens that a step drew, on every rank: the next step may have been planned without them."""

from collections.abc import Sequence

import numpy as np
import torch

from csps.core.plan import SampledToken, StepPlan
from csps.parallel.collectives import TensorComm
from csps.parallel.upload import upload


def share_drawn(
    plan: StepPlan, own: Sequence[SampledToken], everywhere: TensorComm, device: torch.device
) -> dict[int, int]:
    """Token ids by sequence. `own`: those that this rank drew; `everywhere`: all ranks.

    Collective, and the host waits for it. A token is drawn on one rank: the others add 0.
    """
    drawn = {token.seq_id: token.token_id for token in own}
    if everywhere.size == 1:
        return drawn
    seq_ids = [work.seq_id for work in plan.work if work.sample]
    numbers = np.array([drawn.get(seq_id, 0) for seq_id in seq_ids], dtype=np.int64)
    if not seq_ids:
        return {}
    (numbers_N,) = upload([numbers], device)
    everywhere.sum_numbers("drawn", numbers_N)
    return dict(zip(seq_ids, numbers_N.tolist(), strict=True))
