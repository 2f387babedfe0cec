"""From a WorkerSetup to a Runner: device, process groups, weights, KV pool."""

import logging
import time
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from csps.attention.backends import Kernels, torch_cuda
from csps.attention.backends.block_sparse_cpu import BlockSparseCpu
from csps.attention.backends.torch_cpu import DiagonalCpu, TorchCpu
from csps.attention.transfer import KVShape
from csps.checkpoint.config import read_config
from csps.checkpoint.locate import locate
from csps.core.config import WorkerSetup
from csps.core.errors import ConfigError
from csps.core.heads import AxisHeads
from csps.core.model_config import ModelConfig
from csps.core.plan import Lane, Layout
from csps.core.strategy import Placement
from csps.engine.kv_pool import KVPool
from csps.engine.lane import LaneEngine, LayoutEngine
from csps.engine.placements import HeadsSharded, PlacedAttention, TokensAttention
from csps.engine.runner import Runner
from csps.model.layers import upcasts
from csps.model.llama import Llama
from csps.model.loader import load_model
from csps.model.shard import ModelPart, part_config, tensor_parallel, whole_model
from csps.parallel.collectives import SequenceComm, TensorComm
from csps.parallel.mesh import Mesh, build_mesh
from csps.parallel.overlap import CommClock

logger = logging.getLogger(__name__)

# Share of the memory that is free once the weights are in, for all ranks of a machine.
KV_SHARE_CPU = 0.35
KV_SHARE_CUDA = 0.85
# Pieces of a sub-layer's output whose sum over ranks runs beside the next one's computation.
NUM_PIECES = 4
# More than this many full-length sequences per rank would never be used.
MAX_FULL_SEQUENCES = 64


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


def connect_ranks(setup: WorkerSetup, place: Place, device: torch.device) -> Mesh:
    """Collective: returns when every rank has joined."""
    timeout = timedelta(seconds=setup.collective_timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=place.rendezvous,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
    )
    return build_mesh(
        rank=place.rank,
        world_size=place.world_size,
        tp=setup.tp,
        lanes=setup.placement.lanes,
        device=device,
        timeout_s=setup.collective_timeout_s,
    )


def build_runner(setup: WorkerSetup, place: Place, mesh: Mesh) -> tuple[Runner, int]:
    """The rank's runner and the number of pages its pool holds."""
    begun = time.perf_counter()
    checkpoint = locate(setup.model)
    config = read_config(checkpoint, setup.rope_scaling)
    dtype = getattr(torch, setup.dtype.value)
    max_model_len = setup.max_model_len or config.max_position
    resident = whole_model(config).split(mesh.tp)[mesh.t]
    model = load_model(
        checkpoint,
        config,
        dtype=dtype,
        device=mesh.device,
        max_position=max_model_len,
        part=resident,
    )
    model.eval()
    columns = resident.split(mesh.sp)  # parts of the ranks that share this one's weights
    by_head = setup.placement is Placement.HEADS
    held = columns[mesh.s] if by_head else resident
    kv_config = part_config(config, held)
    num_pages = _num_pages(setup, place, kv_config, dtype, max_model_len, mesh)
    pool = KVPool(
        num_layers=config.num_layers,
        num_pages=num_pages,
        block_size=setup.block_size,
        num_kv_heads=held.heads.num_kv_heads,
        head_dim=config.head_dim,
        # Only a prefill over KV by token range fetches blocks.
        staging_blocks=0 if by_head else -(-max_model_len // setup.block_size),
        dtype=dtype,
        device=mesh.device,
    )
    kernels = _kernels(dtype, mesh.device, num_cpu_threads(setup, place))
    heads = AxisHeads(resident.heads, tuple(part.heads for part in columns))
    attention: PlacedAttention
    if by_head:
        attention = HeadsSharded(pool, kernels, heads, mesh.device)
    else:
        shape = KVShape(
            block_size=setup.block_size,
            group_size=kv_config.group_size,
            head_dim=config.head_dim,
            dtype=dtype,
            wire=setup.csa.wire,
        )
        attention = TokensAttention(
            mesh.s, mesh.sp, pool, kernels, setup.csa, heads, shape, mesh.device
        )
    runner = Runner(
        rank=place.rank,
        attention=attention,
        lanes={
            lane: _lane_engine(model, resident, mesh, lane, NUM_PIECES if setup.csa.pipeline else 1)
            for lane in setup.placement.lanes
        },
        block_size=setup.block_size,
        eos_ids=frozenset(config.eos_token_ids),
        device=mesh.device,
    )
    logger.info(
        "rank %d: %s in %s, KV for %d tokens, ready after %.1f s",
        place.rank,
        checkpoint.name,
        setup.dtype.value,
        num_pages * setup.block_size,
        time.perf_counter() - begun,
    )
    return runner, num_pages


def _kernels(dtype: torch.dtype, device: torch.device, num_threads: int) -> Kernels:
    if device.type == "cuda":
        return torch_cuda.KERNELS
    upcast = upcasts(dtype, device)
    return Kernels(
        partial=TorchCpu(upcast=upcast),
        block_sparse=BlockSparseCpu(upcast=upcast, num_threads=num_threads),
        diagonal=DiagonalCpu(upcast=upcast),
    )


def _lane_engine(
    model: Llama, resident: ModelPart, mesh: Mesh, lane: Lane, num_pieces: int
) -> LaneEngine:
    clock = CommClock()
    groups = mesh.lanes[lane]
    in_row = TensorComm(groups.tensor, mesh.t, mesh.tp, clock)
    layouts = {Layout.SP: _layout_engine(model, resident, resident, in_row, num_pieces)}
    if groups.all is groups.tensor:
        layouts[Layout.TP] = layouts[Layout.SP]
    else:
        everywhere = TensorComm(groups.all, mesh.s * mesh.tp + mesh.t, mesh.size, clock)
        part = resident.split(mesh.sp)[mesh.s]
        layouts[Layout.TP] = _layout_engine(model, resident, part, everywhere, num_pieces)
    return LaneEngine(layouts=layouts, sequence=SequenceComm(mesh, lane, clock), clock=clock)


def _layout_engine(
    model: Llama, resident: ModelPart, part: ModelPart, comm: TensorComm, num_pieces: int
) -> LayoutEngine:
    if comm.size > 1:
        model = tensor_parallel(
            model,
            resident,
            part,
            rank=comm.rank,
            size=comm.size,
            reduce=comm.all_reduce,
            num_pieces=num_pieces,
        )
    return LayoutEngine(model, comm)


def _num_pages(
    setup: WorkerSetup,
    place: Place,
    config: ModelConfig,
    dtype: torch.dtype,
    max_model_len: int,
    mesh: Mesh,
) -> int:
    # A rank without heads holds nothing; it follows the others.
    page_bytes = max(config.kv_bytes_per_token(dtype.itemsize), 1) * setup.block_size
    if setup.kv_memory_bytes:
        pages = setup.kv_memory_bytes // page_bytes
    else:
        if mesh.device.type == "cuda":
            free = torch.cuda.mem_get_info(mesh.device)[0] * KV_SHARE_CUDA
        else:
            free = psutil.virtual_memory().available * KV_SHARE_CPU / place.local_world_size
        useful = MAX_FULL_SEQUENCES * -(-max_model_len // setup.block_size)
        pages = min(int(free // page_bytes), useful)
    if pages < 1:
        raise ConfigError(
            f"--kv-memory: one block of {setup.block_size} tokens takes {page_bytes} bytes on "
            "each rank, which is more than there is room for"
        )
    return int(pages)
