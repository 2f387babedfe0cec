"""Linear's two ways of computing, RMSNorm and rotation, each against plain torch."""

import pytest
import torch
import torch.nn.functional as F

from csps.attention.rotate import rotate, rotation
from csps.core.model_config import RopeConfig
from csps.model.layers import RMSNorm, linear, upcasts
from csps.model.rope import rope_table


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "num_inputs", "num_outputs"),
    [
        (1, 96, 80),
        (2, 96, 80),
        (7, 2048, 1100),  # three blocks of weight rows, the last one short
        (4100, 64, 33),  # three blocks of rows
        (2049, 4096, 300),  # both
        (0, 96, 80),
    ],
)
def test_linear_upcast(num_rows, num_inputs, num_outputs, has_bias, dtype):
    x = torch.randn(num_rows, num_inputs).to(dtype)
    weight = (torch.randn(num_outputs, num_inputs) / num_inputs**0.5).to(dtype)
    bias = torch.randn(num_outputs).to(dtype) if has_bias else None
    expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    for out_dtype in (dtype, torch.float32):
        y = linear(x, weight, bias, upcast=True, out_dtype=out_dtype)
        assert y.dtype is out_dtype
        assert y.is_contiguous()
        # One row is computed in 16 bits whatever is asked for; then rounding is all there is.
        exact = out_dtype is torch.float32 and num_rows != 1
        tolerance = 1e-5 if exact else 2e-2
        torch.testing.assert_close(y.float(), expected, atol=tolerance, rtol=tolerance)


def test_upcasts_only_16_bit_matrices_on_cpus():
    assert not upcasts(torch.float32, "cpu")
    assert not upcasts(torch.bfloat16, "cuda")
    assert upcasts(torch.bfloat16, "cpu") != torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype):
    norm = RMSNorm(48, 1e-5, dtype=dtype, device="cpu")
    norm.weight.copy_(torch.randn(48))
    x = torch.randn(5, 48, dtype=dtype)
    exact = x.double()
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(norm(x).double(), expected, atol=tolerance, rtol=tolerance)


def test_rotate_turns_each_pair_by_position_times_frequency():
    table = rope_table(RopeConfig(theta=100.0), 8, 1000, "cpu")
    positions = torch.tensor([0, 1, 999, 5])
    x = torch.randn(4, 3, 2, 8)
    cos, sin = rotation(table, positions)
    rotated = rotate(x, cos, sin).double()
    frequencies = 100.0 ** (-torch.arange(4).double() / 4)
    angles = (positions.double()[:, None] * frequencies)[:, None, None]
    expected = torch.complex(x[..., :4].double(), x[..., 4:].double()) * torch.exp(1j * angles)
    expected = torch.cat((expected.real, expected.imag), -1)
    torch.testing.assert_close(rotated, expected, atol=2e-4, rtol=0)


def test_scores_depend_on_distance_alone():
    table = rope_table(RopeConfig(), 64, 4096, "cpu")
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)

    def score(position, distance):
        at = [rotation(table, torch.tensor([p])) for p in (position, position - distance)]
        return (rotate(q, *at[0]) * rotate(k, *at[1])).sum()

    torch.testing.assert_close(score(100, 70), score(4000, 70), atol=1e-2, rtol=0)
