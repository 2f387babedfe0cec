"""Decode as CUDA graphs, where a rank can."""

import logging
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist

from csps.attention.backends import FixedDecode
from csps.core.config import WorkerSetup
from csps.core.plan import Lane
from csps.engine.bucketed import BucketedDecode, bucket_sizes
from csps.engine.cuda_graphs import GraphCapture
from csps.engine.lane import LaneEngine
from csps.engine.placements import HeadsSharded, TokensAttention
from csps.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


def captures(setup: WorkerSetup, mesh: Mesh) -> bool:
    """Whether decode is captured, if its kernels can be; the same on every rank."""
    return setup.cuda_graphs and mesh.device.type == "cuda" and not mesh.staged


def cuda_graphs(
    setup: WorkerSetup,
    mesh: Mesh,
    lanes: Mapping[Lane, LaneEngine],
    attention: TokensAttention | HeadsSharded,
) -> BucketedDecode | None:
    """Captured at once: no step waits for it, and what memory they take is taken. Collective."""
    if not captures(setup, mesh):
        return None
    if not _on_all_ranks(isinstance(attention.kernels.paged_decode, FixedDecode), mesh):
        logger.info("decode runs without CUDA graphs: torch's kernels launch others each step")
        return None
    begun = time.perf_counter()
    (lane,) = (engine for lane, engine in lanes.items() if lane is not Lane.PREFILL)
    bucketed = BucketedDecode(
        attention,
        lane,
        setup.decode_layouts,
        bucket_sizes(setup.step_sequences),
        GraphCapture(mesh.device, lane.clock),
    )
    logger.info("decode captured as CUDA graphs in %.1f s", time.perf_counter() - begun)
    return bucketed


def _on_all_ranks(flag: bool, mesh: Mesh) -> bool:
    """Whether it is true everywhere: each rank has chosen its kernels by itself. Collective."""
    if mesh.size == 1:
        return flag
    flags = torch.tensor([flag], dtype=torch.int32, device=mesh.device)
    dist.all_reduce(flags, dist.ReduceOp.MIN)
    return bool(flags)
