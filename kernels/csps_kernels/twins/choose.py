"""Twin of csps_kernels.choose: in order of mass, in whole numbers. Suffixes as there."""

import torch
from torch import Tensor

UNITS = 2**24
SHARE_UNITS = 2**30


def choose(mass_KNJ: Tensor, tiles_N: Tensor, gamma: float, window: int) -> Tensor:
    """As the kernel's contract says."""
    keep_KNJ = torch.zeros(mass_KNJ.shape, dtype=torch.bool, device=mass_KNJ.device)
    share = round((1.0 - gamma) * SHARE_UNITS)
    for head in range(len(mass_KNJ)):
        for row, tile in enumerate(tiles_N.tolist()):
            units = (mass_KNJ[head, row, : tile + 1].double() * UNITS).long().tolist()
            allowed = sum(units) * share // SHARE_UNITS
            kept = set(range(len(units)))
            optional = range(1, max(tile - window, 1))
            # The smallest goes first, of equal ones the last.
            for block in sorted(optional, key=lambda block: (units[block], -block)):
                allowed -= units[block]
                if allowed < 0 or gamma >= 1.0:
                    break
                kept.discard(block)
            keep_KNJ[head, row, sorted(kept)] = True
    return keep_KNJ
