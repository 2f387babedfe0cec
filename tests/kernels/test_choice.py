"""Which kernels --attention-backend gives a rank, and what it says where it has none."""

import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from csps.attention.backends import Kernels, Partial, triton
from csps.attention.transfer import KVShape
from csps.core.attention import Wire
from csps.core.config import AttentionBackend
from csps.core.errors import ConfigError
from csps.worker.kernels import ChosenKernels, choose_kernels, fastest_by_phase, torch_kernels
from csps.worker.trial_inputs import TrialSize, random_inputs
from csps.worker.trials import TRIALS

TORCH, TRITON, FLASHINFER = (
    AttentionBackend.TORCH,
    AttentionBackend.TRITON,
    AttentionBackend.FLASHINFER,
)
SHAPE = KVShape(block_size=16, group_size=3, head_dim=64, dtype=torch.float32, wire=Wire.MODEL)
HALF = KVShape(block_size=16, group_size=3, head_dim=64, dtype=torch.float16, wire=Wire.MODEL)
CPU = torch.device("cpu")
# A driver is not asked for before the package is.
GPU = torch.device("cuda")

# Of the interpreter, where a row of the scores sees no key.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")


def choose(wanted: AttentionBackend, shape: KVShape, device: torch.device) -> ChosenKernels:
    return choose_kernels(wanted, shape, device, num_kv_heads=2, num_threads=1)


def fastest(
    offered: dict[AttentionBackend, Kernels], shape: KVShape, device: torch.device
) -> ChosenKernels:
    inputs = random_inputs(shape, 2, TrialSize(16, 1, 1, 2, 1), device)
    return fastest_by_phase(offered, tried_on=inputs, timed_on=inputs)


def wrong(partial: Partial) -> Partial:
    def call(q_THD: Tensor, k_LHD: Tensor, v_LHD: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        o_THD, lse_TH = partial(q_THD, k_LHD, v_LHD, causal=causal)
        return o_THD, lse_TH / 0.6931  # of base 2

    return call


def slow(partial: Partial) -> Partial:
    def call(q_THD: Tensor, k_LHD: Tensor, v_LHD: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        time.sleep(0.1)
        return partial(q_THD, k_LHD, v_LHD, causal=causal)

    return call


def test_auto_is_torch_on_cpus() -> None:
    chosen = choose(AttentionBackend.AUTO, SHAPE, CPU)
    assert str(chosen) == "torch"
    assert set(chosen.backends) == set(TRIALS)


@pytest.mark.parametrize("block_size", [16, 64])
def test_triton_is_tried_out(device: torch.device, block_size: int) -> None:
    shape = KVShape(block_size, 3, 64, torch.float16, Wire.MODEL)
    chosen = choose(TRITON, shape, device)
    assert chosen.kernels is triton.KERNELS
    assert str(chosen) == "triton"


@pytest.mark.parametrize("phase", ["partial", "paged_decode", "merge"])
def test_kernels_that_fail_are_not_taken(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no shared memory\nat all")

    monkeypatch.setattr(triton, "KERNELS", triton.KERNELS._replace(**{phase: fail}))
    what = rf"\({phase}: RuntimeError: no shared memory\)$"
    with pytest.raises(ConfigError, match=rf"^--attention-backend: triton cannot run on .*{what}"):
        choose(TRITON, SHAPE, device)


def test_kernels_that_are_wrong_are_not_taken(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = triton.KERNELS._replace(partial=wrong(triton.KERNELS.partial))
    monkeypatch.setattr(triton, "KERNELS", kernels)
    with pytest.raises(ConfigError, match=r"^--attention-backend: triton .*partial: Assertion"):
        choose(TRITON, SHAPE, device)


def test_each_phase_has_the_fastest(device: torch.device) -> None:
    """Phases that two backends share are the first one's."""
    of_torch = torch_kernels(HALF.dtype, device, num_threads=1)
    slower = of_torch._replace(partial=slow(of_torch.partial))
    chosen = fastest({TRITON: slower, TORCH: of_torch}, HALF, device)
    assert str(chosen) == "triton (partial: torch)"
    assert chosen.kernels == of_torch
    other_way = fastest({TRITON: of_torch, TORCH: slower}, HALF, device)
    assert str(other_way) == "triton"
    assert other_way.kernels == of_torch


def test_for_graphs_decode_is_one_that_they_can_run(device: torch.device) -> None:
    of_torch = torch_kernels(HALF.dtype, device, num_threads=1)
    fixed = of_torch._replace(paged_decode=triton.KERNELS.paged_decode)
    inputs = random_inputs(HALF, 2, TrialSize(16, 1, 1, 2, 1), device)
    offered = {TORCH: of_torch, TRITON: fixed}
    graphs = fastest_by_phase(offered, tried_on=inputs, timed_on=inputs, for_graphs=True)
    assert str(graphs) == "torch (paged_decode: triton)"
    if device.type == "cpu":
        assert str(fastest(offered, HALF, device)) == "torch", "an interpreter is slow"
    alone = fastest_by_phase({TORCH: of_torch}, tried_on=inputs, timed_on=inputs, for_graphs=True)
    assert str(alone) == "torch"


def test_wrong_kernels_do_not_compete(device: torch.device) -> None:
    of_torch = torch_kernels(HALF.dtype, device, num_threads=1)
    offered = {
        TORCH: of_torch._replace(partial=wrong(of_torch.partial), diagonal=None),
        TRITON: triton.KERNELS,
    }
    chosen = fastest(offered, HALF, device)
    for phase in ("partial", "diagonal"):
        assert chosen.backends[phase] is TRITON
        assert getattr(chosen.kernels, phase) is getattr(triton.KERNELS, phase)
    if device.type == "cpu":
        assert str(chosen) == "torch (partial: triton, diagonal: triton)", "an interpreter is slow"


def test_someone_must_be_right() -> None:
    of_torch = torch_kernels(SHAPE.dtype, CPU, num_threads=1)
    offered = {TORCH: of_torch._replace(partial=wrong(of_torch.partial))}
    with pytest.raises(ConfigError, match=r"^--attention-backend: no kernel for partial runs here"):
        fastest(offered, SHAPE, CPU)


@pytest.mark.parametrize(
    ("wanted", "package", "device", "extra"),
    [(TRITON, "triton", CPU, "gpu"), (FLASHINFER, "flashinfer", GPU, "flashinfer")],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch,
    wanted: AttentionBackend,
    package: str,
    device: torch.device,
    extra: str,
) -> None:
    backends = triton.__name__.rpartition(".")[0]
    for name in list(sys.modules):
        of_backend = name.startswith((f"{backends}.triton", f"{backends}.flashinfer"))
        if of_backend or name.split(".")[0] in ("csps_kernels", package):
            monkeypatch.delitem(sys.modules, name)
    if wanted is FLASHINFER:
        monkeypatch.setitem(sys.modules, "csps.attention.backends.triton", triton)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as caught:
        choose(wanted, HALF, device)
    assert str(caught.value) == (
        f"--attention-backend: {package} is not installed: pip install 'csps[{extra}]'"
    )


@pytest.mark.parametrize(
    ("shape", "device", "message"),
    [
        (HALF, CPU, "needs a GPU and CUDA; triton and torch run on CPUs"),
        (SHAPE, GPU, "has no kernels for float32: --dtype bfloat16"),
        (replace(HALF, head_dim=80), GPU, "has kernels for head dims (64, 128, 256), not 80"),
    ],
)
def test_what_flashinfer_cannot_do(shape: KVShape, device: torch.device, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(FLASHINFER, shape, device)
    assert str(caught.value) == f"--attention-backend: flashinfer {message}"
