"""End to end through the engine: time to first token, decode steps, Python's share, memory.

Two models: Llama-3.1-8B's shape with random weights, made on the device; and the default model's
real weights on the repository's own documents. Decode steps of a batch attend to random KV, as many
tokens of each row as there is room for: what is there does not change their time.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from csps.checkpoint.config import read_config
from csps.checkpoint.locate import locate
from csps.checkpoint.tokenizer import load_tokenizer
from csps.core.attention import DENSE, AttentionKind, AttentionParams
from csps.core.config import AttentionBackend, DType, WorkerSetup
from csps.core.errors import CheckpointError
from csps.model.llama import Llama
from csps.model.shard import ModelPart, part_config
from csps.parallel.mesh import Mesh
from csps.worker.build import Built, assemble, build_runner
from csps.worker.place import Place
from scripts.bench_gpu import real_lists
from scripts.bench_gpu.bench import Bench, NotHereError, Row
from scripts.bench_gpu.engine_steps import Served, decode, memory, prefill
from scripts.bench_gpu.rank import Rank, serving

WEIGHT_STD = 0.02
CPU_KV_BYTES = 1 << 22
DOCUMENTS = ("README.md", "docs", "CONTRIBUTING.md", "kernels/README.md", "deploy")
CSA = AttentionParams(AttentionKind.CSA, seed=1)
ATTENTIONS = (DENSE, AttentionParams(AttentionKind.CSA_DISTANCE, seed=1), CSA)


def llama(bench: Bench) -> None:
    """Random weights. Their attention is nearly even, so that CSA keeps nearly all of it and falls
    back: `csa` shows what that costs, `csa-distance` (whose choice is by rule) what sparsity gains.
    """
    config, sizes = bench.sizes.model, bench.sizes
    setup = _setup(bench, "random weights", max(sizes.model_prompts) + sizes.stage)

    def load(part: ModelPart, dtype: torch.dtype, max_position: int) -> Llama:
        shape = part_config(config, part)
        model = Llama(shape, dtype=dtype, device=bench.device, max_position=max_position)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, WEIGHT_STD, generator=bench.generator)
        return model

    def build(setup: WorkerSetup, place: Place, mesh: Mesh) -> Built:
        return assemble(setup, place, mesh, config, load)

    served = Served(setup, config, build)
    _decodes(bench, served, sizes.model_decodes)
    draw = torch.Generator().manual_seed(bench.seed)
    prompts = [
        torch.randint(config.vocab_size, (count,), generator=draw).tolist()
        for count in sizes.model_prompts
    ]
    _prefills(bench, served, prompts)


def default_model(bench: Bench) -> None:
    """Real weights and text; skipped where the model is not there."""
    try:
        checkpoint = locate(bench.model)
        config = read_config(checkpoint)
    except CheckpointError as error:
        reason = str(error)

        def skip() -> Row:
            raise NotHereError(reason)

        bench.case("model", skip)
        return
    setup = _setup(bench, bench.model, config.max_position)
    served = Served(setup, config, build_runner)
    text = load_tokenizer(checkpoint).encode(_documents(), add_special_tokens=True)
    length = min(bench.sizes.prompt, len(text))
    bench.case("model", lambda: {"name": checkpoint.name, "text_tokens": len(text)})
    _prefills(bench, served, [text[:length]])
    _decodes(bench, served, bench.sizes.prompt_decodes)

    def lists(rank: Rank) -> None:
        real_lists.measure(bench, config, rank, text[:length], CSA)

    _on_rank(bench, served, "real lists", lists)


def _setup(bench: Bench, model: str, max_model_len: int) -> WorkerSetup:
    on_cpu = bench.device.type == "cpu"
    return WorkerSetup(
        model=model,
        dtype=DType.FLOAT32 if on_cpu else DType.BFLOAT16,
        block_size=bench.sizes.page_size,
        kv_memory_bytes=CPU_KV_BYTES if on_cpu else 0,
        step_tokens=bench.sizes.stage,
        max_model_len=max_model_len,
        attention_backend=AttentionBackend.TRITON if on_cpu else AttentionBackend.AUTO,
    )


def _decodes(bench: Bench, served: Served, batches: Sequence[tuple[int, int]]) -> None:
    """With CUDA graphs and without; a CPU has none."""
    for graphs in (True, False) if bench.device.type == "cuda" else (False,):
        name = "graphs" if graphs else "no graphs"

        def cases(rank: Rank, name: str = name) -> None:
            for num_rows, num_keys in batches:
                work = functools.partial(decode, bench, served, rank, num_rows, num_keys)
                bench.case(f"decode {num_rows} x {num_keys}, {name}", work)

        setup = replace(served.setup, cuda_graphs=graphs)
        _on_rank(bench, served._replace(setup=setup), f"decode, {name}", cases)


def _prefills(bench: Bench, served: Served, prompts: list[list[int]]) -> None:
    """Each way to attend, on a new rank where one has failed."""
    pending = list(ATTENTIONS)

    def cases(rank: Rank) -> None:
        while pending and not rank.has_failed:
            attention = pending.pop(0)
            for token_ids in prompts:
                work = functools.partial(prefill, bench, served, rank, token_ids, attention)
                bench.case(f"prefill {len(token_ids)}, {attention.kind}", work)
            name = f"prefill, {attention.kind}: memory"
            bench.case(name, functools.partial(memory, bench, served, rank))

    while pending:
        before = len(pending)
        _on_rank(bench, served, "prefill", cases)
        if len(pending) == before:
            break  # there is no rank


def _on_rank(bench: Bench, served: Served, name: str, cases: Callable[[Rank], None]) -> None:
    """Run `cases` on a new rank, then add a row of its memory, or of why there was no rank."""

    def group() -> Row:
        with serving(served.setup, bench.device, served.build) as rank:
            cases(rank)
            return memory(bench, served, rank)

    bench.case(f"{name}: memory", group)


def _documents() -> str:
    """The repository's own prose, one file behind the other."""
    root = Path(__file__).parents[2]
    paths = [path for name in DOCUMENTS for path in _markdown(root / name)]
    return "\n\n".join(path.read_text("utf-8") for path in paths)


def _markdown(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.md"))
