"""How many KV blocks a rank holds, and whether it fits into its GPU at all. Pure arithmetic."""

from dataclasses import dataclass

from csps.core.config import WorkerSetup
from csps.core.errors import ConfigError
from csps.core.model_config import ModelConfig

# Share of the memory that is free once the weights are in, for all ranks of a machine.
CPU_SHARE = 0.35
# More than this many full-length sequences per rank would never be used.
MAX_FULL_SEQUENCES = 64
# fp32 logits' size, as often as it is taken while tokens are drawn: logits, scores without stop
# tokens, those of the drawn rows, tempered, sorted with their ids (3) and as much to sort them,
# shares, noise.
LOGITS_COPIES = 12
_GIB = 1 << 30
_SMALLER = "--max-model-len, --stage-tokens or --token-budget, or more ranks with --tp, would help"


@dataclass(frozen=True, slots=True)
class KvBlocks:
    """`block_bytes`: of one block's KV on one rank. `useful`: more blocks would never be used.

    `table_bytes`: of what decode's page tables have for it, beside.
    """

    block_bytes: int
    useful: int
    table_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.block_bytes + self.table_bytes


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes of a GPU that `num_ranks` ranks share, before any has loaded its weights."""

    total: int
    free: int
    num_ranks: int = 1


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that a rank takes on its GPU beside KV blocks."""

    weights: int
    workspace: int
    staging: int

    @property
    def total(self) -> int:
        return self.weights + self.workspace + self.staging


def kv_blocks(
    held: ModelConfig, setup: WorkerSetup, max_model_len: int, *, table_bytes: int = 0
) -> KvBlocks:
    """`held`: the part of the model whose KV the rank holds."""
    # A rank without heads holds nothing; it follows the others.
    token_bytes = max(held.kv_bytes_per_token(setup.dtype.element_bytes), 1)
    return KvBlocks(
        block_bytes=token_bytes * setup.block_size,
        useful=MAX_FULL_SEQUENCES * -(-max_model_len // setup.block_size),
        table_bytes=table_bytes,
    )


def footprint(
    resident: ModelConfig,
    setup: WorkerSetup,
    max_model_len: int,
    staging_bytes: int,
    *,
    decode_bytes: int = 0,
) -> Footprint:
    """What a rank that computes the part `resident` takes at most, but for libraries' buffers.

    Activations are those of csps.model.llama in the largest step: the residual stream and its
    norm, then either the MLP's or attention's, whose accumulators and rotations are fp32. Besides,
    a whole context's K and V may be gathered, and copied for every query head. `decode_bytes`: what
    decode's kernels take beside activations, but for what grows with the KV blocks.
    """
    config, element_bytes = resident, setup.dtype.element_bytes
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    mlp = element_bytes * (2 * config.intermediate_size + config.hidden_size)
    attention = element_bytes * (3 * query + 2 * kv + config.hidden_size) + 4 * (2 * query + kv)
    activations = 2 * element_bytes * config.hidden_size + max(mlp, attention)
    context = 2 * element_bytes * (query + kv)
    logits = 4 * LOGITS_COPIES * config.vocab_size
    # Of decode's buckets, which share the activations of the largest; their sizes add up to twice
    # its, and each keeps its logits.
    graphs = activations + 2 * 4 * config.vocab_size if setup.cuda_graphs else 0
    rope = 4 * max_model_len * config.head_dim
    return Footprint(
        weights=config.num_parameters() * element_bytes + rope,
        workspace=setup.step_tokens * activations
        + max_model_len * context
        + setup.step_sequences * (logits + graphs)
        + decode_bytes,
        staging=staging_bytes,
    )


def blocks_on_cpu(
    setup: WorkerSetup, kv: KvBlocks, needs: Footprint, free_bytes: int, num_ranks: int
) -> int:
    """Blocks of each of `num_ranks` ranks that are to share a machine's free memory."""
    if setup.kv_memory_bytes:
        return _asked(setup, kv)
    room = int(CPU_SHARE * (free_bytes / num_ranks - needs.weights))
    num_blocks = min(room // kv.block_bytes, kv.useful)
    if num_blocks < 1:
        raise _no_block(setup, kv)
    return num_blocks


def blocks_on_gpu(setup: WorkerSetup, kv: KvBlocks, needs: Footprint, memory: GpuMemory) -> int:
    """Blocks beside `needs`. ConfigError says how much memory is missing.

    Ranks that share a GPU have equal parts of it, and count on nobody else being there.
    """
    shares = memory.num_ranks > 1
    if setup.kv_memory_bytes:
        num_blocks = _asked(setup, kv)
        room = memory.total // memory.num_ranks if shares else memory.free
        wanted = num_blocks * kv.total_bytes
        if needs.total + wanted > room:
            raise ConfigError(
                f"--kv-memory: {_missing(needs, wanted, room)}; a smaller --kv-memory, {_SMALLER}"
            )
        return num_blocks
    limit = int(memory.total * setup.gpu_memory_utilization) // memory.num_ranks
    room = limit if shares else limit - (memory.total - memory.free)
    num_blocks = min((room - needs.total) // kv.total_bytes, kv.useful)
    if num_blocks < 1:
        raise ConfigError(
            f"--gpu-memory-utilization: {_missing(needs, kv.total_bytes, room)}, which is what "
            f"{setup.gpu_memory_utilization:g} of {_gib(memory.total)} leaves this rank; "
            f"a larger --gpu-memory-utilization, a smaller {_SMALLER}"
        )
    return num_blocks


def _asked(setup: WorkerSetup, kv: KvBlocks) -> int:
    num_blocks = setup.kv_memory_bytes // kv.block_bytes
    if num_blocks < 1:
        raise _no_block(setup, kv)
    return num_blocks


def _no_block(setup: WorkerSetup, kv: KvBlocks) -> ConfigError:
    return ConfigError(
        f"--kv-memory: one block of {setup.block_size} tokens takes {kv.block_bytes} bytes on "
        "each rank, which is more than there is room for"
    )


def _missing(needs: Footprint, kv_bytes: int, room: int) -> str:
    return (
        f"{_gib(needs.total + kv_bytes - room)} of GPU memory are missing: weights "
        f"{_gib(needs.weights)}, workspace {_gib(needs.workspace)}, fetched KV "
        f"{_gib(needs.staging)} and KV blocks {_gib(kv_bytes)} do not fit into {_gib(max(room, 0))}"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
