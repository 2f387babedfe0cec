"""Which kernels --attention-backend gives a rank, and what it says where it has none."""

import sys

import pytest
import torch
from torch import Tensor

from csps.attention.backends import Kernels, triton
from csps.attention.transfer import KVShape
from csps.core.attention import Wire
from csps.core.config import AttentionBackend
from csps.core.errors import ConfigError
from csps.worker.kernels import choose_kernels

SHAPE = KVShape(block_size=16, group_size=3, head_dim=64, dtype=torch.float32, wire=Wire.MODEL)
CPU = torch.device("cpu")


def test_auto_is_triton_on_gpus_alone(device: torch.device) -> None:
    chosen = choose_kernels(AttentionBackend.AUTO, SHAPE, device, num_threads=1)
    on_gpu = torch.device(device).type == "cuda"
    assert chosen.backend is (AttentionBackend.TRITON if on_gpu else AttentionBackend.TORCH)
    assert choose_kernels(AttentionBackend.AUTO, SHAPE, CPU, num_threads=1).backend == "torch"


@pytest.mark.parametrize("block_size", [16, 64])
def test_triton_is_tried_out(device: torch.device, block_size: int) -> None:
    shape = KVShape(block_size, 3, 64, torch.float16, Wire.MODEL)
    chosen = choose_kernels(AttentionBackend.TRITON, shape, torch.device(device), num_threads=1)
    assert chosen == (AttentionBackend.TRITON, triton.KERNELS)


def test_kernels_that_are_wrong_are_not_taken(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = triton.KERNELS.partial

    def wrong(
        q_THD: Tensor, k_LHD: Tensor, v_LHD: Tensor, *, causal: bool
    ) -> tuple[Tensor, Tensor]:
        o_THD, lse_TH = right(q_THD, k_LHD, v_LHD, causal=causal)
        return o_THD, lse_TH / 0.6931  # of base 2

    kernels: Kernels = triton.KERNELS._replace(partial=wrong)
    monkeypatch.setattr(triton, "KERNELS", kernels)
    with pytest.raises(ConfigError, match=r"^--attention-backend: triton cannot run on .*Assert"):
        choose_kernels(AttentionBackend.TRITON, SHAPE, torch.device(device), num_threads=1)
    chosen = choose_kernels(AttentionBackend.AUTO, SHAPE, torch.device(device), num_threads=1)
    assert chosen.backend is AttentionBackend.TORCH


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == "csps_kernels" or name == triton.__name__:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError) as caught:
        choose_kernels(AttentionBackend.TRITON, SHAPE, CPU, num_threads=1)
    assert str(caught.value) == (
        "--attention-backend: triton is not installed: pip install 'csps[gpu]'"
    )
