"""Cases of one rank of the engine: a prompt, a run of decode steps, and its memory."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from csps.core.attention import DENSE, AttentionParams
from csps.core.config import WorkerSetup
from csps.core.model_config import ModelConfig
from csps.core.plan import StepResult
from csps.engine.kv_pool import KVPool
from csps.worker import pages
from scripts.bench_gpu.bench import Bench, Row
from scripts.bench_gpu.rank import Build, Rank

WARM_STEPS = 4
DECODE_ROOM = 1  # tokens behind a prompt that is not decoded


class Served(NamedTuple):
    """What a rank serves, and how it is built."""

    setup: WorkerSetup
    config: ModelConfig
    build: Build


def prefill(
    bench: Bench, served: Served, rank: Rank, token_ids: Sequence[int], attention: AttentionParams
) -> Row:
    """Time to first token of a prompt that is alone, its shorter twin run before it to compile."""
    stage = min(2 * served.setup.step_tokens, len(token_ids))
    first_s, _ = _first_token(bench, rank, token_ids[:stage], attention)
    seconds, results = _first_token(bench, rank, token_ids, attention)
    flops = prefill_flops(served.config, len(token_ids))
    reports = [report for result in results for report in result.sparse]
    kept, causal = (sum(getattr(r, key) for r in reports) for key in ("kept_pairs", "causal_pairs"))
    heads = [head for report in reports for head in report.heads]
    dense = f"prefill {len(token_ids)}, {DENSE.kind}"
    dense_s = next((row.get("median_s") for row in bench.rows if row["case"] == dense), None)
    return {
        "median_s": seconds,
        "over_dense": seconds / dense_s if dense_s else None,
        "repeats": 1,
        "first_s": first_s,
        "first_tokens": stage,
        "tokens_per_s": len(token_ids) / seconds,
        "steps": len(results),
        "flops": flops,
        **bench.floor_of(seconds, flops, 0.0),  # of dense attention
        "backend": rank.built.backend,
        "density": kept / causal if causal else None,
        "heads_dense": sum(head.gamma >= 1.0 for head in heads),
        "heads": len(heads),
    }


def _first_token(
    bench: Bench, rank: Rank, token_ids: Sequence[int], attention: AttentionParams
) -> tuple[float, list[StepResult]]:
    results: list[StepResult] = []

    def work() -> None:
        results[:] = rank.prefill(token_ids, attention, DECODE_ROOM)[1]

    seconds = bench.timer.until_done(work)
    rank.release_all()
    return seconds, results


def decode(bench: Bench, served: Served, rank: Rank, num_rows: int, num_keys: int) -> Row:
    """Steps of a batch; the share of a step in which the device has nothing to do is Python's."""
    sizes = bench.sizes
    steps = WARM_STEPS + sizes.decode_steps + sizes.profiled_steps
    num_keys = min(num_keys, rank.num_tokens // num_rows - steps - served.setup.block_size)
    _fill_pool(bench, rank)
    running = [rank.with_context(num_keys, steps + 1) for _ in range(num_rows)]
    warm = [rank.decode(running)[1] for _ in range(WARM_STEPS)]
    cpu_begun = time.process_time()
    measured = [rank.decode(running) for _ in range(sizes.decode_steps)]
    cpu_s = (time.process_time() - cpu_begun) / len(measured)
    seconds = [step_s for _, step_s in measured]
    busy_s = busy_seconds(bench.device, lambda: _steps(rank, running, sizes.profiled_steps))
    rank.release_all()
    step_s = median(seconds)
    if busy_s is not None:
        busy_s /= sizes.profiled_steps
    num_bytes = decode_bytes(served, num_rows, num_keys)
    flops = 2.0 * served.config.num_parameters() * num_rows
    return {
        "median_s": step_s,
        "low_s": min(seconds),
        "high_s": max(seconds),
        "repeats": len(seconds),
        "first_s": warm[0],
        "rows": num_rows,
        "keys": num_keys,
        "tokens_per_s": num_rows / step_s,
        "bytes": num_bytes,
        **bench.floor_of(step_s, flops, num_bytes),
        "backend": rank.built.backend,
        "cuda_graphs": rank.built.runner.bucketed is not None,
        "runner_s": median(result.stats.wall_s for result, _ in measured),
        "cpu_s": cpu_s,
        "device_busy_s": busy_s,
        "python_share": None if busy_s is None else max(1.0 - busy_s / step_s, 0.0),
    }


def _steps(rank: Rank, running: Sequence, count: int) -> None:
    for _ in range(count):
        rank.decode(running)


def _fill_pool(bench: Bench, rank: Rank) -> None:
    pool: KVPool = rank.built.runner.attention.pool
    for flat in (pool.flat_keys, pool.flat_values):
        flat.normal_(generator=bench.generator)
    if bench.device.type == "cuda":
        torch.cuda.synchronize(bench.device)  # the lane has a stream of its own


def busy_seconds(device: torch.device, work: Callable[[], None]) -> float | None:
    """Seconds in which the device ran anything while `work` did; None without a GPU."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    )
    if not spans:
        return None
    busy_us, until = 0.0, spans[0][0]
    for begin, end in spans:
        busy_us += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return busy_us / 1e6


def prefill_flops(config: ModelConfig, num_tokens: int) -> float:
    """Of matrix products with dense attention: weights of all layers, causal pairs."""
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    layers = config.num_parameters() - embeddings
    pairs = num_tokens * (num_tokens + 1) / 2
    attention = 4.0 * config.num_layers * config.num_heads * config.head_dim * pairs
    return 2.0 * layers * num_tokens + attention


def decode_bytes(served: Served, num_rows: int, num_keys: int) -> float:
    """What a step reads at least: all weights but the embedding's other rows, and the rows' KV."""
    config, element_bytes = served.config, served.setup.dtype.element_bytes
    parameters = config.num_parameters()
    if not config.tie_embeddings:
        parameters -= config.vocab_size * config.hidden_size
    kv = num_rows * num_keys * config.kv_bytes_per_token(element_bytes)
    return float(parameters * element_bytes + kv)


def memory(bench: Bench, served: Served, rank: Rank) -> Row:
    """Peaks since the process began, beside what csps.worker.memory counts on; bytes."""
    setup, config, longest = served.setup, served.config, served.setup.max_model_len
    steps = pages.decode_steps(setup, longest, num_shards=1, for_graphs=setup.cuda_graphs)
    kernels = rank.built.runner.attention.kernels
    decode = pages.decode_bytes(kernels.paged_decode, steps, config, bench.device)
    staging_blocks = -(-longest // setup.block_size)
    kv, needs = pages.demands(setup, config, config, longest, staging_blocks, decode)
    formula = needs.total + rank.built.num_pages * kv.total_bytes
    row: Row = {
        "formula_bytes": formula,
        "weights_bytes": needs.weights,
        "workspace_bytes": needs.workspace,
        "kv_tokens": rank.num_tokens,
        "peak_bytes": None,
    }
    if bench.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(bench.device)
        row |= {
            "peak_bytes": peak,
            "peak_over_formula": peak / formula,
            "reserved_bytes": torch.cuda.max_memory_reserved(bench.device),
        }
        torch.cuda.reset_peak_memory_stats(bench.device)
    return row
