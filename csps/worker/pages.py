"""How many pages of KV a rank's pool has: what its device has room for."""

import psutil
import torch

from csps.core.config import WorkerSetup
from csps.core.model_config import ModelConfig
from csps.worker.memory import GpuMemory, blocks_on_cpu, blocks_on_gpu, footprint, kv_blocks


def num_pages(
    setup: WorkerSetup,
    held: ModelConfig,
    resident: ModelConfig,
    *,
    max_model_len: int,
    staging_blocks: int,
    ranks_here: int,
    device: torch.device,
) -> int:
    """Before anything is loaded: ConfigError says what is missing on a GPU.

    `held`: the part of the model whose KV the rank holds; `resident`: the part it computes.
    `ranks_here`: ranks of its machine.
    """
    kv = kv_blocks(held, setup, max_model_len)
    # Of one layer; and the pool's scratch page, of all.
    staging_bytes = staging_blocks * kv.block_bytes // held.num_layers + kv.block_bytes
    needs = footprint(resident, setup, max_model_len, staging_bytes)
    if device.type != "cuda":
        free = psutil.virtual_memory().available
        return blocks_on_cpu(setup, kv, needs, free, num_ranks=ranks_here)
    free, total = torch.cuda.mem_get_info(device)
    num_ranks = -(-ranks_here // torch.cuda.device_count())
    return blocks_on_gpu(setup, kv, needs, GpuMemory(total, free, num_ranks))
