"""What decode's kernels are counted on to take on a GPU, worked out by hand.

Llama-3.1-8B's heads on 132 multiprocessors, two sequences of up to 8192 tokens in pages of 64.
"""

from dataclasses import replace

import pytest
import torch

from csps.attention.backends.decode_memory import (
    DecodeBytes,
    DecodeShape,
    DecodeSteps,
    SizedDecode,
)
from csps.attention.backends.flashinfer_tables import decode_bytes as by_flashinfer
from csps.attention.backends.torch_cpu import cpu_kernels
from csps.attention.backends.triton import KERNELS
from csps.core.config import WorkerSetup
from csps.core.model_config import ModelConfig, RopeConfig
from csps.core.plan import Layout
from csps.core.strategy import Placement
from csps.worker import pages
from csps_kernels.paged_decode import FixedPlan, plan_bytes

SHAPE = DecodeShape(num_kv_heads=8, group_size=4, head_dim=128, num_processors=132)
PLAIN = DecodeSteps(num_rows=2, num_calls=1, pages_per_row=128)
GRAPHS = PLAIN._replace(fixed_rows=(1, 2))
SETUP = WorkerSetup("none", block_size=64, step_sequences=5)


def by_triton(shape: DecodeShape, steps: DecodeSteps) -> DecodeBytes:
    decode = KERNELS.paged_decode
    assert isinstance(decode, SizedDecode)
    return decode.device_bytes(shape, steps)


# 132 * 12 = 1584 programs, so 198 chunks of 256 keys for 8 KV heads, and 1 + 2 a row: 203.
# [203, 3], [3], [203] and 256 pages, each a multiple of 4 long: 612 + 4 + 204 + 256.
TRITON_TABLES = 4 * 1076
# o [203, 32, 128] and lse [203, 32], fp32.
TRITON_PARTIALS = 4 * 203 * 32 * 129


def test_triton_without_graphs() -> None:
    assert by_triton(SHAPE, PLAIN) == (TRITON_TABLES + TRITON_PARTIALS, 0)
    twice = by_triton(SHAPE, PLAIN._replace(num_calls=2))
    assert twice == (2 * TRITON_TABLES + TRITON_PARTIALS, 0)


def test_triton_with_graphs() -> None:
    """Tables of each bucket, the largest's partial outputs, and 4 bytes a row of each page."""
    one = 604 + 4 + 204  # [201, 3], [2], [201]
    two = 612 + 4 + 204  # as above
    fixed = TRITON_TABLES + 2 * TRITON_PARTIALS + 4 * (one + 4 + two + 4)
    assert by_triton(SHAPE, GRAPHS) == (fixed, 4 * (1 + 2))


@pytest.mark.parametrize("num_pages", [1, 2, 3, 4, 1001])
def test_tables_of_a_fixed_plan_are_what_is_counted(num_pages: int) -> None:
    """Page by page, but for what pads them: less than is added for that."""
    for num_rows in (1, 5):
        plan = FixedPlan(
            num_rows,
            num_rows * num_pages,
            page_size=64,
            num_kv_heads=8,
            num_processors=132,
            device=torch.device("cpu"),
        )
        taken = plan.plan.chunks.untyped_storage().nbytes()
        assert taken == plan_bytes(num_rows, num_rows * num_pages, 8, 132)
        without = by_triton(SHAPE, PLAIN._replace(num_rows=num_rows))
        counted = by_triton(SHAPE, PLAIN._replace(num_rows=num_rows, fixed_rows=(num_rows,)))
        partials = 4 * (199 + 2 * num_rows) * 32 * 129
        room = counted.fixed - without.fixed - partials + counted.per_page * num_pages
        assert 0 <= room - taken <= 16


# 2 programs a multiprocessor, each a tile of 16 rows with 4 heads: o of 128 and lse, fp32; 1 MiB of
# room; and FlashInfer's own 8 MiB.
WRAPPER = 4 * 2 * 132 * 16 * 4 * 129 + (1 << 20) + (8 << 20)


def test_flashinfer_without_graphs() -> None:
    """[3], [3], [2] and 256 pages in int32, this step's and the last one's; [2] in int64."""
    call = WRAPPER + 2 * 4 * (3 + 3 + 2 + 256) + 8 * 2
    assert call == 18157648
    assert by_flashinfer(SHAPE, PLAIN) == (call, 0)
    assert by_flashinfer(SHAPE, PLAIN._replace(num_calls=2)) == (2 * call, 0)


def test_flashinfer_with_graphs() -> None:
    """A wrapper a bucket; with more than 132 rows and KV heads, of its own size."""
    plain = by_flashinfer(SHAPE, PLAIN).fixed
    one, two = 4 * (2 + 2 + 1) + 1, 4 * (3 + 3 + 2) + 2
    staged = 4 * 2 * 128
    assert by_flashinfer(SHAPE, GRAPHS) == (plain + 2 * WRAPPER + one + two + staged, 4 * (1 + 2))
    wrapper = 4 * 2 * (64 * 8) * 16 * 4 * 129 + (1 << 20) + (8 << 20)
    tables = 4 * (65 + 65 + 64) + 64 + 4 * 64 * 128
    large = by_flashinfer(SHAPE, PLAIN._replace(fixed_rows=(64,)))
    assert large == (plain + wrapper + tables, 4 * 64)


def test_steps_of_a_rank() -> None:
    """A rank that shares sequences answers for its peers too, one with heads runs chunks too."""

    def steps(setup: WorkerSetup, **of: int) -> DecodeSteps:
        return pages.decode_steps(setup, 129, **({"num_shards": 1, "for_graphs": False} | of))

    assert steps(SETUP) == DecodeSteps(num_rows=5, num_calls=1, pages_per_row=3)
    assert steps(SETUP, num_shards=2).num_calls == 2
    assert steps(replace(SETUP, placement=Placement.HEADS)).num_calls == 2
    assert steps(SETUP, for_graphs=True).fixed_rows == (1, 2, 4, 5)
    one_layout = replace(SETUP, step_sequences=2, decode_layouts=(Layout.TP,))
    assert steps(one_layout, num_shards=3, for_graphs=True).fixed_rows == (1, 2)
    both = replace(one_layout, decode_layouts=(Layout.SP, Layout.TP))
    assert steps(both, num_shards=3, for_graphs=True).fixed_rows == (1, 2, 1, 2, 4, 2)
    by_head = replace(both, placement=Placement.HEADS)
    assert steps(by_head, num_shards=3, for_graphs=True).fixed_rows == (3, 3, 3, 3)


def test_nothing_is_counted_where_decode_takes_no_more_than_activations() -> None:
    model = ModelConfig("LlamaForCausalLM", 99, 64, 64, 2, 4, 2, 16, 1e-5, 128, RopeConfig())
    of_torch = cpu_kernels(upcast=False, num_threads=1).paged_decode
    assert not isinstance(of_torch, SizedDecode)
    assert pages.decode_bytes(of_torch, GRAPHS, model, torch.device("cuda")) == (0, 0)
    on_cpu = pages.decode_bytes(KERNELS.paged_decode, GRAPHS, model, torch.device("cpu"))
    assert on_cpu == (0, 0)


def test_tables_come_with_the_blocks() -> None:
    """The scratch page has its own; staged blocks, of one layer of two, have none."""
    model = ModelConfig("LlamaForCausalLM", 99, 64, 64, 2, 4, 2, 16, 1e-5, 128, RopeConfig())
    block = 2 * 2 * 2 * 16 * 2 * 64
    needs = {}
    for decode in (DecodeBytes(0, 0), DecodeBytes(1000, 12)):
        kv, needs[decode] = pages.demands(SETUP, model, model, 128, 6, decode)
        assert (kv.block_bytes, kv.total_bytes) == (block, block + decode.per_page)
        assert needs[decode].staging == 6 * block // 2 + block + decode.per_page
    without, with_tables = needs.values()
    assert with_tables.workspace - without.workspace == 1000
