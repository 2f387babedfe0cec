"""How many pages of KV a rank's pool has: what its device has room for."""

import psutil
import torch

from csps.attention.backends import PagedDecode
from csps.attention.backends.decode_memory import (
    DecodeBytes,
    DecodeShape,
    DecodeSteps,
    SizedDecode,
)
from csps.core.config import WorkerSetup
from csps.core.model_config import ModelConfig
from csps.core.strategy import Placement
from csps.engine.bucketed import bucket_sizes
from csps.engine.fixed_steps import fixed_rows
from csps.worker.memory import (
    Footprint,
    GpuMemory,
    KvBlocks,
    blocks_on_cpu,
    blocks_on_gpu,
    footprint,
    kv_blocks,
)


def num_pages(
    setup: WorkerSetup, kv: KvBlocks, needs: Footprint, *, sharers: int, device: torch.device
) -> int:
    """Before anything is loaded: ConfigError says what is missing on a GPU.

    `kv`, `needs`: as `demands` has them. `sharers`: ranks on its device.
    """
    if device.type != "cuda":
        free = psutil.virtual_memory().available
        return blocks_on_cpu(setup, kv, needs, free, num_ranks=sharers)
    free, total = torch.cuda.mem_get_info(device)
    return blocks_on_gpu(setup, kv, needs, GpuMemory(total, free, sharers))


def demands(
    setup: WorkerSetup,
    held: ModelConfig,
    resident: ModelConfig,
    max_model_len: int,
    staging_blocks: int,
    decode: DecodeBytes,
) -> tuple[KvBlocks, Footprint]:
    """What a block takes, and what the rank takes beside blocks.

    `held`: the part of the model whose KV the rank holds; `resident`: the part it computes.
    """
    kv = kv_blocks(held, setup, max_model_len, table_bytes=decode.per_page)
    # Of one layer; and the pool's scratch page, of all.
    staging_bytes = staging_blocks * kv.block_bytes // held.num_layers + kv.total_bytes
    needs = footprint(resident, setup, max_model_len, staging_bytes, decode_bytes=decode.fixed)
    return kv, needs


def decode_steps(
    setup: WorkerSetup, max_model_len: int, *, num_shards: int, for_graphs: bool
) -> DecodeSteps:
    """The largest that a rank runs; `num_shards`: ranks of the sequence axis.

    `for_graphs`: whether there are CUDA graphs.
    """
    # A second call: of peers' rows; or, where KV is placed by head, of a prompt's last token behind
    # chunks. There, more than that (prompts of one new token between longer ones) is not counted.
    alone = setup.placement is Placement.TOKENS and num_shards == 1
    sizes = bucket_sizes(setup.step_sequences) if for_graphs else []
    return DecodeSteps(
        num_rows=setup.step_sequences,
        num_calls=1 if alone else 2,
        pages_per_row=-(-max_model_len // setup.block_size),
        fixed_rows=tuple(
            rows
            for size in sizes
            for rows in fixed_rows(setup.placement, setup.decode_layouts, num_shards, size)
        ),
    )


def decode_bytes(
    decode: PagedDecode, steps: DecodeSteps, held: ModelConfig, device: torch.device
) -> DecodeBytes:
    """What `decode` takes on a GPU beside activations, at most; nothing is counted on a CPU."""
    if device.type != "cuda" or not isinstance(decode, SizedDecode):
        return DecodeBytes(0, 0)
    shape = DecodeShape(
        num_kv_heads=max(held.num_kv_heads, 1),  # a rank's part may have none
        group_size=max(held.group_size, 1),
        head_dim=held.head_dim,
        num_processors=torch.cuda.get_device_properties(device).multi_processor_count,
    )
    return decode.device_bytes(shape, steps)
