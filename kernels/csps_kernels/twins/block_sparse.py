"""Twin of csps_kernels.block_sparse. Suffixes as there; L keys of an item."""

import itertools

import torch
from torch import Tensor


def block_sparse(
    q_IRD: Tensor, k_PBD: Tensor, v_PBD: Tensor, starts: Tensor, pages: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """As the kernel's contract says, but o in fp32."""
    o_IRD = torch.zeros(q_IRD.shape, dtype=torch.float32, device=q_IRD.device)
    lse_IR = o_IRD.new_full(q_IRD.shape[:2], -torch.inf)
    for item, (start, stop) in enumerate(itertools.pairwise(starts.tolist())):
        index = pages[start:stop]
        assert len(index) <= longest
        if len(index):
            k_LD, v_LD = (x[index].flatten(0, 1).float() for x in (k_PBD, v_PBD))
            scores_RL = q_IRD[item].float() @ k_LD.T / q_IRD.shape[2] ** 0.5
            o_IRD[item] = scores_RL.softmax(1) @ v_LD
            lse_IR[item] = scores_RL.logsumexp(1)
    return o_IRD, lse_IR
