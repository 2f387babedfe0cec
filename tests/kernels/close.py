"""How near a kernel must come to its twin."""

import torch
from torch import Tensor

# Rounding of inputs to products and of the output; the twin rounds nothing.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def assert_like_twin(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    """(o of `dtype`, lse in fp32) against the twin's (o, lse) in fp32."""
    (o, lse), (twin_o, twin_lse) = found, expected
    assert o.dtype == dtype
    assert lse.dtype == torch.float32
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(o.float(), twin_o, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, twin_lse, rtol=tolerance, atol=tolerance)
