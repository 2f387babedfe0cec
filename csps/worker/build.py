"""From a WorkerSetup and a mesh to a Runner: kernels, KV pool, weights, lanes."""

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from csps.attention.backends import Kernels
from csps.attention.transfer import KVShape
from csps.checkpoint.config import read_config
from csps.checkpoint.locate import locate
from csps.core.config import WorkerSetup
from csps.core.heads import AxisHeads
from csps.core.model_config import ModelConfig
from csps.core.plan import Lane, Layout
from csps.core.strategy import Placement
from csps.engine.kv_pool import KVPool
from csps.engine.lane import LaneEngine, LayoutEngine
from csps.engine.placements import HeadsSharded, TokensAttention
from csps.engine.runner import Runner
from csps.model.llama import Llama
from csps.model.loader import load_model
from csps.model.shard import ModelPart, part_config, tensor_parallel, whole_model
from csps.parallel.collectives import SequenceComm, TensorComm
from csps.parallel.mesh import Mesh
from csps.parallel.overlap import CommClock
from csps.worker.graphs import captures, cuda_graphs
from csps.worker.kernels import choose_kernels
from csps.worker.pages import decode_bytes, decode_steps, demands, num_pages
from csps.worker.place import Place, num_cpu_threads

logger = logging.getLogger(__name__)

# Pieces of a sub-layer's output whose sum over ranks runs beside the next one's computation.
NUM_PIECES = 4


class _Parts(NamedTuple):
    """What a rank has of the model.

    `columns`: parts of the ranks that share its weights, of which `held` is this rank's where KV
    is placed by head.
    """

    resident: ModelPart
    columns: list[ModelPart]
    held: ModelPart


def _parts(config: ModelConfig, setup: WorkerSetup, mesh: Mesh) -> _Parts:
    resident = whole_model(config).split(mesh.tp)[mesh.t]
    columns = resident.split(mesh.sp)
    by_head = setup.placement is Placement.HEADS
    return _Parts(resident, columns, columns[mesh.s] if by_head else resident)


class Built(NamedTuple):
    """A rank that can run steps. `num_pages`: of its pool. `backend`: whose kernels attend."""

    runner: Runner
    num_pages: int
    backend: str


# The rank's part of the model, its weights as the type given and for so many positions.
LoadPart = Callable[[ModelPart, torch.dtype, int], Llama]


def build_runner(setup: WorkerSetup, place: Place, mesh: Mesh) -> Built:
    """Load the rank's part. ConfigError if its device is too small or cannot run the kernels."""
    begun = time.perf_counter()
    checkpoint = locate(setup.model)
    config = read_config(checkpoint, setup.rope_scaling)

    def load(part: ModelPart, dtype: torch.dtype, max_position: int) -> Llama:
        return load_model(
            checkpoint,
            config,
            dtype=dtype,
            device=mesh.device,
            max_position=max_position,
            part=part,
        )

    built = assemble(setup, place, mesh, config, load)
    logger.info(
        "rank %d: %s in %s on %s, attention by %s, KV for %d tokens, ready after %.1f s",
        place.rank,
        checkpoint.name,
        setup.dtype.value,
        mesh.device,
        built.backend,
        built.num_pages * setup.block_size,
        time.perf_counter() - begun,
    )
    return built


def assemble(
    setup: WorkerSetup, place: Place, mesh: Mesh, config: ModelConfig, load: LoadPart
) -> Built:
    """A rank of a model of this shape, wherever `load` has its weights from.

    `load` is called once it is known that they fit: ConfigError, as `build_runner`, if not.
    """
    max_model_len = setup.max_model_len or config.max_position
    parts = _parts(config, setup, mesh)
    held, resident = (part_config(config, part) for part in (parts.held, parts.resident))
    shape = KVShape(
        block_size=setup.block_size,
        group_size=max(held.group_size, 1),
        head_dim=config.head_dim,
        dtype=getattr(torch, setup.dtype.value),
        wire=setup.csa.wire,
    )
    num_threads = num_cpu_threads(setup, place)
    for_graphs = captures(setup, mesh)
    chosen = choose_kernels(
        setup.attention_backend,
        shape,
        mesh.device,
        num_kv_heads=max(parts.held.heads.num_kv_heads, 1),
        num_threads=num_threads,
        for_graphs=for_graphs,
    )
    # Only a prefill over KV by token range fetches blocks.
    by_head = setup.placement is Placement.HEADS
    staging_blocks = 0 if by_head else -(-max_model_len // setup.block_size)
    steps = decode_steps(setup, max_model_len, num_shards=mesh.sp, for_graphs=for_graphs)
    decode = decode_bytes(chosen.kernels.paged_decode, steps, held, mesh.device)
    kv, needs = demands(setup, held, resident, max_model_len, staging_blocks, decode)
    pages = num_pages(setup, kv, needs, sharers=mesh.sharers, device=mesh.device)
    model = load(parts.resident, shape.dtype, max_model_len)
    model.eval()
    pool = KVPool(
        num_layers=config.num_layers,
        num_pages=pages,
        block_size=setup.block_size,
        num_kv_heads=parts.held.heads.num_kv_heads,
        head_dim=config.head_dim,
        staging_blocks=staging_blocks,
        dtype=shape.dtype,
        device=mesh.device,
    )
    lanes = {
        lane: _lane_engine(model, parts.resident, mesh, lane, setup.csa.pipeline)
        for lane in setup.placement.lanes
    }
    attention = _placed_attention(setup, mesh, parts, pool, chosen.kernels, shape)
    runner = Runner(
        rank=place.rank,
        attention=attention,
        lanes=lanes,
        block_size=setup.block_size,
        eos_ids=frozenset(config.eos_token_ids),
        device=mesh.device,
        bucketed=cuda_graphs(setup, mesh, lanes, attention),
        keeps_drawn=setup.async_scheduling,
    )
    return Built(runner, pages, str(chosen))


def _placed_attention(
    setup: WorkerSetup, mesh: Mesh, parts: _Parts, pool: KVPool, kernels: Kernels, shape: KVShape
) -> TokensAttention | HeadsSharded:
    heads = AxisHeads(parts.resident.heads, tuple(part.heads for part in parts.columns))
    messages = kernels.messages(heads, mesh.s, mesh.device)
    if setup.placement is Placement.HEADS:
        return HeadsSharded(pool, kernels, heads, messages, mesh.device)
    return TokensAttention(
        mesh.s, mesh.sp, pool, kernels, setup.csa, heads, messages, shape, mesh.device
    )


def _lane_engine(
    model: Llama, resident: ModelPart, mesh: Mesh, lane: Lane, pipeline: bool
) -> LaneEngine:
    clock, num_pieces = CommClock(), NUM_PIECES if pipeline else 1
    groups = mesh.lanes[lane]
    in_row = TensorComm(groups.tensor, mesh.t, mesh.tp, clock, staged=mesh.staged)
    layouts = {Layout.SP: _layout_engine(model, resident, resident, in_row, num_pieces)}
    if groups.all is groups.tensor:
        layouts[Layout.TP] = layouts[Layout.SP]
    else:
        rank = mesh.s * mesh.tp + mesh.t
        everywhere = TensorComm(groups.all, rank, mesh.size, clock, staged=mesh.staged)
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
