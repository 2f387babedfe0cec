"""Linear and RMSNorm. Their parameters are created empty, without gradients.

Shapes: T rows (tokens), I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Blocks of the upcast: 2^20 weights are 4 MiB in fp32, which stays in cache, so the block is
# read from memory once, as bf16. Rows are cut for the same reason, and because glibc maps and
# unmaps buffers above 32 MiB at each use (1 us a page).
_BLOCK_WEIGHTS = 1 << 20
_BLOCK_ROWS = 2048


def upcasts(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether matrices of `dtype` are faster multiplied in fp32 on `device`.

    So it is on CPUs without AVX-512 or bf16/fp16 instructions: there oneDNN has no kernel for
    these types, and torch falls back to one that runs at a ninth of the speed of fp32.
    """
    if torch.device(device).type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if not torch.backends.mkldnn.is_available():
        return True
    if dtype is torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """A parameter to be filled by a loader."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class Linear(nn.Module):
    """y = x W^T + b for x [T, I]; W [O, I], b [O] or None. Returns [T, O] in x's dtype.

    `upcast` (see `upcasts`): more than one row is computed in fp32 from blocks of the weight
    converted on the fly. One row always takes the direct way: a matrix-vector product is bound
    by memory, and bf16 is half the bytes (measured on Zen 3, 1 thread, 1536 x 576: 1 row
    190 us direct, 239 upcast; 2 rows 362 and 303; 1024 rows 183 ms and 20).
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, *, upcast: bool) -> None:
        """Takes the storage of `weight_OI` and `bias_O`, which may be views."""
        super().__init__()
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        self.upcast = upcast

    @classmethod
    def empty(
        cls,
        num_inputs: int,
        num_outputs: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str,
        upcast: bool,
    ) -> "Linear":
        """To be filled by a loader."""
        weight = torch.empty(num_outputs, num_inputs, dtype=dtype, device=device)
        bias_O = torch.empty(num_outputs, dtype=dtype, device=device) if bias else None
        return cls(weight, bias_O, upcast=upcast)

    def outputs(self, start: int, stop: int) -> "Linear":
        """Outputs [start, stop), in this layer's storage."""
        bias_O = None if self.bias is None else self.bias[start:stop]
        return Linear(self.weight[start:stop], bias_O, upcast=self.upcast)

    def inputs(self, start: int, stop: int) -> "Linear":
        """Inputs [start, stop), in this layer's storage, with its whole bias."""
        return Linear(self.weight[:, start:stop], self.bias, upcast=self.upcast)

    def forward(self, x_TI: Tensor) -> Tensor:
        return linear(x_TI, self.weight, self.bias, upcast=self.upcast, out_dtype=x_TI.dtype)


def linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    *,
    upcast: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """x W^T + b as `out_dtype` [T, O]; with `upcast` nothing in between is rounded to 16 bits."""
    num_rows, num_outputs = x_TI.shape[0], weight_OI.shape[0]
    if num_rows <= 1 or not upcast:
        return F.linear(x_TI, weight_OI, bias_O).to(out_dtype)
    block = max(_BLOCK_WEIGHTS // max(weight_OI.shape[1], 1), 1)
    if num_rows <= _BLOCK_ROWS and num_outputs <= block:
        return _linear_fp32(x_TI.float(), weight_OI, bias_O).to(out_dtype)
    out_TO = torch.empty(num_rows, num_outputs, dtype=out_dtype, device=x_TI.device)
    x_blocks = [rows.float() for rows in x_TI.split(_BLOCK_ROWS)]
    for at in range(0, num_outputs, block):
        weight = weight_OI[at : at + block].float()
        bias = None if bias_O is None else bias_O[at : at + block]
        for x, out in zip(x_blocks, out_TO[:, at : at + block].split(_BLOCK_ROWS), strict=True):
            out.copy_(_linear_fp32(x, weight, bias))
    return out_TO


def _linear_fp32(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    bias = None if bias_O is None else bias_O.float()
    return F.linear(x_TI, weight_OI.float(), bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32 inside (arXiv 1910.07467)."""

    def __init__(
        self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.weight = empty_parameter(size, dtype=dtype, device=device)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
