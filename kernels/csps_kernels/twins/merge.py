"""Twin of csps_kernels.merge. Suffixes as there."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def merge(
    o_MHD: Tensor,
    lse_MH: Tensor,
    rows_by_source: Sequence[np.ndarray],
    num_rows: int,
    own: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As the kernel's contract says: (o [T, H, D] fp32, lse [T, H])."""
    rows_M = np.concatenate([np.empty(0, np.int64), *rows_by_source])
    out_THD = torch.zeros(num_rows, *o_MHD.shape[1:], device=o_MHD.device)
    out_lse_TH = out_THD.new_full(out_THD.shape[:2], -torch.inf)
    for row in range(num_rows):
        parts = torch.from_numpy(np.flatnonzero(rows_M == row)).to(o_MHD.device)
        o_SHD, lse_SH = o_MHD[parts].float(), lse_MH[parts]
        if own is not None:
            o_SHD = torch.cat((own[0][row][None], o_SHD))
            lse_SH = torch.cat((own[1][row][None], lse_SH))
        for head in range(o_MHD.shape[1]):
            seen = lse_SH[:, head] > -torch.inf
            if seen.any():
                lse_S = lse_SH[seen, head]
                out_THD[row, head] = lse_S.softmax(0) @ o_SHD[seen, head]
                out_lse_TH[row, head] = lse_S.logsumexp(0)
    return out_THD, out_lse_TH
