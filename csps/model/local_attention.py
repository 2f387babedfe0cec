"""Causal attention of one sequence whose KV is all here: the reference, and a model on its own."""

import torch
import torch.nn.functional as F
from torch import Tensor


class LocalAttention:
    """An `Attend` that keeps the KV of one sequence; feed it the sequence's tokens in order.

    Shapes as in csps.model.llama; S tokens seen so far, the new T among them.
    """

    def __init__(self) -> None:
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        if layer in self._kv:
            k_before, v_before = self._kv[layer]
            k_SKD, v_SKD = torch.cat((k_before, k_TKD)), torch.cat((v_before, v_TKD))
        else:
            k_SKD, v_SKD = k_TKD, v_TKD.contiguous()
        self._kv[layer] = k_SKD, v_SKD
        T, S = q_THD.shape[0], k_SKD.shape[0]
        mask = None
        if 1 < T < S:
            # is_causal is aligned top-left; the new tokens are the last ones.
            mask = torch.ones(T, S, dtype=torch.bool, device=q_THD.device).tril(S - T)
        o_HTD = F.scaled_dot_product_attention(
            q_THD.transpose(0, 1)[None],
            k_SKD.transpose(0, 1)[None],
            v_SKD.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=T == S,
            enable_gqa=True,
        )
        return o_HTD[0].transpose(0, 1)
