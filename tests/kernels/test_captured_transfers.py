"""Transfers in what is captured as a CUDA graph; without a GPU, in what would be."""

import torch
import torch.distributed as dist
from torch import Tensor

from csps.core.config import WorkerSetup
from csps.engine.cuda_graphs import GraphCapture
from csps.parallel.collectives import TensorComm
from csps.parallel.overlap import CommClock
from csps.worker.place import Place, connect_ranks
from tests.dist.ranks import run_ranks

STEPS = (1.0, -2.0, 0.5)


def test_a_sum_over_ranks(device) -> None:
    """NCCL takes one rank a GPU, so the group has one; bytes are counted as those of two."""
    run_ranks(1, repeat, device.type)


def repeat(place: Place, device_type: str) -> None:
    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
    connect_ranks(WorkerSetup("", collective_timeout_s=60.0), place, device)
    clock = CommClock()
    comm = TensorComm(dist.new_group([0]), 0, 2, clock, staged=False)
    x = torch.zeros(1000, device=device)

    def forward() -> Tensor:
        partial = x * 2.0
        comm.all_reduce(partial).wait()
        return partial + 1.0

    run = GraphCapture(device, clock)(forward) if device.type == "cuda" else forward
    for value in STEPS:
        clock.reset()
        x.fill_(value)
        y = run()
        assert (y == 2.0 * value + 1.0).all()
        clock.settle()
        assert clock.bytes_sent == {"hidden": x.nbytes}
        assert clock.bytes_received == {"hidden": x.nbytes}
    del run  # NCCL's communicator ends after the graph that has its transfers
    dist.destroy_process_group()
