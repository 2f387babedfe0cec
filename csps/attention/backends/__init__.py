"""Kernels behind one interface: `Partial`."""

from typing import Protocol

from torch import Tensor


class Partial(Protocol):
    """Attention of some rows over some keys, with what it takes to merge it."""

    def __call__(
        self, q_THD: Tensor, k_LHD: Tensor, v_LHD: Tensor, *, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Return (o [T, Hq, D] in q's dtype or fp32, lse [T, Hq] fp32, natural log).

        k, v are [L, Hkv, D] with L > 0, T > 0; Hq is a multiple of Hkv. `causal`: T == L and
        row i sees keys 0..i. Scale is 1 / sqrt(D).
        """
        ...
