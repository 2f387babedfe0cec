"""The `csps bench` commands."""

import asyncio
import shlex
import signal
import sys
from typing import Annotated

import typer

from csps.bench import record, steps
from csps.bench.cli_layouts import layouts
from csps.bench.cli_network import network
from csps.bench.cli_prefix import prefix
from csps.bench.cli_quality import quality
from csps.bench.cli_recall import recall
from csps.bench.cli_scheduling import scheduling
from csps.bench.cli_strategies import strategies
from csps.bench.cli_traffic import traffic
from csps.bench.flags import (
    Json,
    Model,
    Ranks,
    Seed,
    ServeFlags,
    Stage,
    Text,
    Threads,
    attention_kinds,
    console,
    lengths,
    parameters,
    show,
)
from csps.bench.interference import interference
from csps.bench.measure import ServerFlags, prompt_ids
from csps.bench.peers import peers
from csps.checkpoint.locate import DEFAULT_MODEL
from csps.core.config import DType

app = typer.Typer(no_args_is_help=True)
app.command()(layouts)
app.command()(network)
app.command()(prefix)
app.command()(quality)
app.command()(recall)
app.command()(scheduling)
app.command()(strategies)
app.command()(traffic)


@app.callback()
def main() -> None:
    """Measure a real server, started for it; every bench takes --json FILE."""
    # SIGTERM unwinds like Ctrl-C does, so that the server never outlives its bench.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@app.command()
def prefill(
    tokens: Annotated[str, typer.Option(help="Prompt lengths, by commas.")] = "2048,8000",
    ranks: Ranks = 2,
    threads_per_rank: Threads = 1,
    model: Model = DEFAULT_MODEL,
    dtype: DType = DType.BFLOAT16,
    stage_tokens: Stage = 8192,
    attention: Annotated[
        str, typer.Option(help="Ways to attend, by commas: dense, csa, csa-distance.")
    ] = "dense",
    serve: ServeFlags = "",
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each length.")] = 3,
    text: Text = None,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Time to first token of one prompt at a time, where it went, and memory at its peak.

    Ways to attend take turns on one server, each run on a part of the text that starts one token
    later than the run before.
    """
    record.check_writable(json_file)
    flags = ServerFlags(
        model, ranks, threads_per_rank, dtype, stage_tokens, tuple(shlex.split(serve))
    )
    kinds = attention_kinds(attention)
    num_runs = repeat * len(kinds)
    prompts = [prompt_ids(model, n + num_runs, text, seed) for n in lengths("--tokens", tokens)]
    results = asyncio.run(steps.prefill(flags, prompts, kinds, repeat))
    show([{**row["runs"][-1], **row} for row in results],  # type: ignore[index, dict-item]
          "tokens", "attention", "ttft_s", "over dense", "prefill_tok_s", "compute_s", "comm_s",
          "exposed_comm_s", "bytes_moved", "peak_memory_mb")  # fmt: skip
    run = parameters(flags, text, seed, tokens=tokens, repeat=repeat, attention=attention)
    record.write(json_file, "prefill", run, results)


@app.command()
def decode(
    context: Annotated[str, typer.Option(help="Context lengths, by commas.")] = "2048,8000",
    output: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Streams at a time.")] = 1,
    ranks: Ranks = 2,
    threads_per_rank: Threads = 1,
    model: Model = DEFAULT_MODEL,
    dtype: DType = DType.BFLOAT16,
    stage_tokens: Stage = 8192,
    text: Text = None,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Time between tokens, and the bytes a token moves against the formula."""
    record.check_writable(json_file)
    flags = ServerFlags(model, ranks, threads_per_rank, dtype, stage_tokens)
    contexts = [prompt_ids(model, n, text, seed) for n in lengths("--context", context)]
    results = asyncio.run(steps.decode(flags, contexts, output, batch))
    show(results, "context", "batch", "tbt_ms_p50", "tbt_ms_p99", "tok_s",
          "bytes_per_token", "bytes_formula", "bytes_ratio")  # fmt: skip
    run = parameters(flags, text, seed, context=context, output=output, batch=batch)
    record.write(json_file, "decode", run, results)


@app.command("interference")
def interference_command(
    tokens: Annotated[int, typer.Option(min=1, help="Length of the disturbing prompt.")] = 8000,
    context: Annotated[str, typer.Option(help="Contexts of the stream.")] = "100,2000",
    quiet_tokens: Annotated[int, typer.Option(min=10, help="Tokens before the prompt.")] = 200,
    output: Annotated[int, typer.Option(min=2, help="Tokens of the stream at most.")] = 2500,
    ranks: Ranks = 2,
    threads_per_rank: Threads = 1,
    model: Model = DEFAULT_MODEL,
    dtype: DType = DType.BFLOAT16,
    stage_tokens: Stage = 4096,
    text: Text = None,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Time between tokens of a running stream, quiet and while a long prompt prefills."""
    record.check_writable(json_file)
    flags = ServerFlags(model, ranks, threads_per_rank, dtype, stage_tokens)
    prompt = prompt_ids(model, tokens, text, seed)
    results = [
        asyncio.run(
            interference(flags, prompt_ids(model, n, text, seed + 1), prompt, quiet_tokens, output)
        )
        for n in lengths("--context", context)
    ]
    rows = [
        {
            **row,
            **{f"{when}_{key}": row[when][f"tbt_ms_{key}"]  # type: ignore[index]
               for when in ("quiet", "busy") for key in ("p50", "p99")},
        }
        for row in results
    ]  # fmt: skip
    show(rows, "context", "ttft_s", "quiet_p50", "quiet_p99", "busy_p50", "busy_p99",
          "p50_ratio", "p99_ratio")  # fmt: skip
    run = parameters(
        flags, text, seed, tokens=tokens, context=context, quiet_tokens=quiet_tokens, output=output
    )
    record.write(json_file, "interference", run, results)


@app.command("peers")
def peers_command(
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 8000,
    output: Annotated[int, typer.Option(min=2, help="Tokens to decode at that context.")] = 32,
    peer_dtypes: Annotated[
        str, typer.Option(help="Types transformers runs in, by commas.")
    ] = "bfloat16,float32",
    repeat: Annotated[int, typer.Option(min=1, help="Rounds, taking turns.")] = 3,
    ranks: Ranks = 2,
    threads_per_rank: Threads = 1,
    model: Model = DEFAULT_MODEL,
    dtype: DType = DType.BFLOAT16,
    stage_tokens: Stage = 8192,
    text: Text = None,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """CSPS beside Hugging Face transformers (SDPA), on the same tokens and cores."""
    record.check_writable(json_file)
    flags = ServerFlags(model, ranks, threads_per_rank, dtype, stage_tokens)
    prompt = prompt_ids(model, tokens, text, seed)
    results = asyncio.run(peers(flags, prompt, output, peer_dtypes.split(","), repeat, console))
    ratios = {"csps": {"ttft_s": 1.0, "tbt_ms_p50": 1.0}, **results["peer_over_csps"]}  # type: ignore[dict-item]
    show(
        [
            {"system": name, **row, "ttft / csps": ratios[name]["ttft_s"],
             "tbt / csps": ratios[name]["tbt_ms_p50"]}
            for name, row in results["medians"].items()  # type: ignore[attr-defined]
        ],
        "system", "ttft_s", "ttft / csps", "tbt_ms_p50", "tbt / csps",
    )  # fmt: skip
    run = parameters(
        flags, text, seed, tokens=tokens, output=output, peer_dtypes=peer_dtypes, repeat=repeat
    )
    record.write(json_file, "peers", run, results)
