"""KV beside weights and workspace: what fits, and what is said where something does not."""

from dataclasses import replace

import pytest

from csps.core.config import DType, WorkerSetup
from csps.core.errors import ConfigError
from csps.core.model_config import ModelConfig, RopeConfig
from csps.worker.memory import (
    MAX_FULL_SEQUENCES,
    Footprint,
    GpuMemory,
    KvBlocks,
    blocks_on_cpu,
    blocks_on_gpu,
    footprint,
    kv_blocks,
)

GIB = 1 << 30
SETUP = WorkerSetup("none", block_size=64, gpu_memory_utilization=0.9)
LLAMA_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position=131072,
    rope=RopeConfig(),
)
KV = KvBlocks(block_bytes=GIB // 8, useful=1000)
NEEDS = Footprint(weights=10 * GIB, workspace=2 * GIB, staging=GIB)


def test_a_block_holds_keys_and_values_of_all_layers() -> None:
    kv = kv_blocks(LLAMA_8B, SETUP, 1000)
    assert kv.block_bytes == 64 * 2 * 32 * 8 * 128 * 2
    assert kv.useful == MAX_FULL_SEQUENCES * 16  # 1,000 tokens: 16 blocks


def test_a_rank_without_heads_follows_the_others() -> None:
    none = replace(LLAMA_8B, num_heads=0, num_kv_heads=0)
    assert kv_blocks(none, SETUP, 1000).block_bytes > 0


def test_a_footprint_counts_weights_and_grows_with_the_step() -> None:
    needs = footprint(LLAMA_8B, SETUP, 8192, staging_bytes=5)
    assert needs.weights == pytest.approx(8.03e9 * 2, rel=0.01)
    assert needs.staging == 5
    assert needs.total == needs.weights + needs.workspace + 5
    # The residual stream and its norm, and attention's 72 KiB, or a wide MLP's 120.
    for width, per_token in ((14336, 2 * 2 * 4096 + 73728), (28672, 2 * 2 * 4096 + 122880)):
        model = replace(LLAMA_8B, intermediate_size=width)
        small, large = (
            footprint(model, replace(SETUP, step_tokens=tokens), 8192, 5) for tokens in (100, 110)
        )
        assert large.workspace - small.workspace == 10 * per_token
    longer = footprint(LLAMA_8B, SETUP, 8193, staging_bytes=5)
    assert longer.workspace - needs.workspace == 2 * 2 * (32 + 8) * 128
    plain = footprint(LLAMA_8B, replace(SETUP, cuda_graphs=False), 8192, staging_bytes=5)
    graphs = 64 * (2 * 2 * 4096 + 73728 + 2 * 4 * 128256)
    assert needs.workspace - plain.workspace == graphs
    decode = footprint(LLAMA_8B, SETUP, 8192, staging_bytes=5, decode_bytes=7)
    assert decode == replace(needs, workspace=needs.workspace + 7)
    wide = footprint(LLAMA_8B, replace(SETUP, dtype=DType.FLOAT32), 8192, staging_bytes=5)
    assert wide.weights == pytest.approx(8.03e9 * 4, rel=0.01)


def test_a_gpu_of_its_own() -> None:
    """0.9 of 40 GiB less 4 that others use, less 13: 19 GiB of KV."""
    memory = GpuMemory(total=40 * GIB, free=36 * GIB)
    assert blocks_on_gpu(SETUP, KV, NEEDS, memory) == 19 * 8
    half = replace(SETUP, gpu_memory_utilization=0.5)
    assert blocks_on_gpu(half, KV, NEEDS, memory) == 3 * 8
    assert blocks_on_gpu(SETUP, replace(KV, useful=7), NEEDS, memory) == 7


def test_ranks_that_share_a_gpu_have_equal_parts_whoever_loads_first() -> None:
    for free in (80, 60):
        memory = GpuMemory(total=80 * GIB, free=free * GIB, num_ranks=2)
        assert blocks_on_gpu(SETUP, KV, NEEDS, memory) == (36 - 13) * 8


def test_what_is_missing_is_said() -> None:
    memory = GpuMemory(total=16 * GIB, free=15 * GIB)
    needs = replace(NEEDS, weights=11 * GIB)
    # 14.4 - 1 = 13.4 GiB for 14 and a block of 0.125: 0.725 short.
    with pytest.raises(ConfigError) as caught:
        blocks_on_gpu(SETUP, KV, needs, memory)
    text = str(caught.value)
    assert text.startswith("--gpu-memory-utilization: 0.73 GiB of GPU memory are missing: ")
    for part in ("weights 11.00 GiB", "workspace 2.00", "into 13.40 GiB", "0.9 of 16.00", "--tp"):
        assert part in text, text
    enough = replace(SETUP, gpu_memory_utilization=0.95)  # 0.8 GiB more
    assert blocks_on_gpu(enough, KV, needs, memory) == 1


def test_page_tables_come_with_the_blocks_and_out_of_no_ones_kv_memory() -> None:
    """As large as KV here: half as many blocks fit, and 0.725 GiB missing become 0.85."""
    with_tables = kv_blocks(LLAMA_8B, SETUP, 1000, table_bytes=9)
    assert with_tables == replace(kv_blocks(LLAMA_8B, SETUP, 1000), table_bytes=9)
    kv = replace(KV, table_bytes=KV.block_bytes)
    assert kv.total_bytes == GIB // 4
    memory = GpuMemory(total=40 * GIB, free=36 * GIB)
    assert blocks_on_gpu(SETUP, kv, NEEDS, memory) == 19 * 4
    asked = replace(SETUP, kv_memory_bytes=8 * GIB)
    assert blocks_on_gpu(asked, kv, NEEDS, memory) == 8 * 8
    missing = r"2\.00 GiB of GPU memory are missing: weights 10.*fetched KV 1.* and KV blocks 25\."
    with pytest.raises(ConfigError, match=missing):
        blocks_on_gpu(replace(SETUP, kv_memory_bytes=12 * GIB + GIB // 2), kv, NEEDS, memory)
    needs, small = replace(NEEDS, weights=11 * GIB), GpuMemory(total=16 * GIB, free=15 * GIB)
    with pytest.raises(ConfigError, match=r"0\.85 GiB .* and KV blocks 0\.25 GiB do not fit"):
        blocks_on_gpu(SETUP, kv, needs, small)


def test_nothing_is_left_where_others_use_the_gpu() -> None:
    memory = GpuMemory(total=16 * GIB, free=GIB // 2)
    with pytest.raises(ConfigError, match=r"do not fit into 0\.00 GiB"):
        blocks_on_gpu(SETUP, KV, NEEDS, memory)


def test_kv_memory_is_taken_as_it_is_given() -> None:
    """Up to all that is free: the utilization is for `auto`."""
    memory = GpuMemory(total=20 * GIB, free=20 * GIB)
    asked = replace(SETUP, kv_memory_bytes=6 * GIB + 5)
    assert blocks_on_gpu(asked, KV, NEEDS, memory) == 6 * 8
    too_much = replace(SETUP, kv_memory_bytes=8 * GIB)
    with pytest.raises(ConfigError, match=r"--kv-memory: 1\.00 GiB of GPU memory are missing"):
        blocks_on_gpu(too_much, KV, NEEDS, memory)
    too_little = replace(SETUP, kv_memory_bytes=1024)
    for place in (memory, replace(memory, num_ranks=2)):
        with pytest.raises(
            ConfigError, match=r"--kv-memory: one block of 64 tokens takes \d+ bytes"
        ):
            blocks_on_gpu(too_little, KV, NEEDS, place)


def test_ranks_of_a_machine_share_what_the_weights_leave() -> None:
    blocks = blocks_on_cpu(SETUP, KV, NEEDS, 64 * GIB, num_ranks=2)
    assert blocks == int(0.35 * 22 * 8)
    assert blocks_on_cpu(replace(SETUP, kv_memory_bytes=GIB), KV, NEEDS, GIB, num_ranks=2) == 8
    assert blocks_on_cpu(SETUP, replace(KV, useful=3), NEEDS, 64 * GIB, num_ranks=2) == 3
    with pytest.raises(ConfigError, match="--kv-memory: one block of 64 tokens"):
        blocks_on_cpu(SETUP, KV, NEEDS, 20 * GIB, num_ranks=2)
