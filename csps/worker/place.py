"""Where a rank runs, and how it finds the others."""

import logging
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from csps.core.config import WorkerSetup
from csps.parallel.mesh import Mesh, build_mesh

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker runs: from torchrun's variables or from `csps serve`'s launcher."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    rendezvous: str  # init_method of torch.distributed: env://, file:///..., tcp://host:port


def pick_device(local_rank: int) -> torch.device:
    """The rank's own GPU where there are GPUs, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def num_cpu_threads(setup: WorkerSetup, place: Place) -> int:
    cores = len(psutil.Process().cpu_affinity())
    return setup.threads_per_rank or max(cores // place.local_world_size, 1)


def connect_ranks(
    setup: WorkerSetup, place: Place, device: torch.device, *, shares: str = ""
) -> Mesh:
    """Collective: returns when every rank has joined.

    Ranks of the same `shares` are taken to share a GPU; by default those that do.
    """
    timeout = timedelta(seconds=setup.collective_timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        shares = shares or str(torch.cuda.get_device_properties(device).uuid)
    store, rank, world_size = next(
        dist.rendezvous(place.rendezvous, place.rank, place.world_size, timeout=timeout)
    )
    store.set_timeout(timeout)
    everyone = _told_by_all(store, rank, world_size, shares or f"rank {rank}")
    staged = len(set(everyone)) < world_size
    if staged:
        logger.info("rank %d: ranks share GPUs: transfers go through the host", rank)
    dist.init_process_group(
        "nccl" if device.type == "cuda" and not staged else "gloo",
        store=dist.PrefixStore("ranks", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    return build_mesh(
        rank=rank,
        world_size=world_size,
        tp=setup.tp,
        lanes=setup.placement.lanes,
        device=device,
        sharers=everyone.count(shares) if shares else place.local_world_size,
        staged=staged,
        timeout_s=setup.collective_timeout_s,
    )


def _told_by_all(store: dist.Store, rank: int, world_size: int, text: str) -> list[str]:
    """Each rank's `text`; DistStoreError after the store's timeout."""
    store.set(f"told/{rank}", text)
    return [store.get(f"told/{peer}").decode() for peer in range(world_size)]
