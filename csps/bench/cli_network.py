"""The `csps bench network` command."""

from pathlib import Path
from typing import Annotated

import typer

from csps.bench import record
from csps.bench.corpus import corpus_ids
from csps.bench.flags import (
    Json,
    Model,
    Stage,
    Threads,
    attention_kinds,
    console,
    lengths,
    show,
)
from csps.bench.namespaces import MAX_RANKS, check_requirements
from csps.bench.network import NetworkBench, NetworkFlags, Prompts
from csps.checkpoint.locate import DEFAULT_MODEL
from csps.core.attention import AttentionParams, Wire
from csps.core.config import DType
from csps.core.errors import ConfigError, InvalidRequestError

SourceText = Annotated[
    Path | None, typer.Option(help="Real text; default: source of Python's standard library.")
]


def network(
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, by commas.")] = "2,4",
    mbit: Annotated[
        str, typer.Option(help="Rates of each rank's link, 10^6 bits a second, by commas.")
    ] = "1000,200,100",
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 8000,
    attention: Annotated[
        str,
        typer.Option(help="Ways to attend, by commas; sparse ones also run without pipeline."),
    ] = "dense,csa",
    latency_ms: Annotated[
        float,
        typer.Option(min=0.0, help="Added from rank to rank; needs netem in the kernel."),
    ] = 0.0,
    gamma: Annotated[
        float, typer.Option(help="Share of attention mass csa keeps.")
    ] = AttentionParams().gamma,
    csa_wire: Annotated[Wire, typer.Option(help="Type of fetched keys and values.")] = Wire.MODEL,
    csa_min_tokens: Annotated[
        int, typer.Option(min=1, help="Shorter prompts are always dense.")
    ] = 2048,
    threads_per_rank: Threads = 1,
    model: Model = DEFAULT_MODEL,
    dtype: DType = DType.BFLOAT16,
    stage_tokens: Stage = 8192,
    repeat: Annotated[int, typer.Option(min=1, help="Prompts for each variant.")] = 1,
    text: SourceText = None,
    json_file: Json = None,
) -> None:
    """One long prompt, its ranks in namespaces on links of a limited rate. Needs root."""
    nums_ranks, rates = lengths("--ranks", ranks), lengths("--mbit", mbit)
    if min(nums_ranks) < 2 or max(nums_ranks) > MAX_RANKS:
        raise ConfigError(f"--ranks: expected 2 to {MAX_RANKS}, got {ranks!r}")
    kinds = attention_kinds(attention)
    try:
        AttentionParams(gamma=gamma).validate()
    except InvalidRequestError as error:
        raise ConfigError(f"--gamma: {error.problem}") from None
    check_requirements()
    record.check_writable(json_file)
    flags = NetworkFlags(
        model, threads_per_rank, dtype, stage_tokens, gamma, csa_wire, csa_min_tokens
    )
    token_ids = corpus_ids(model, Prompts.num_needed(tokens, repeat), text)
    prompts = Prompts(token_ids, tokens, repeat)
    bench = NetworkBench(flags, prompts, kinds, repeat, latency_ms)
    results = bench.run(nums_ranks, rates, console)
    rows = [{**row, "MB received": row["received_bytes_max"] / 1e6} for row in results]  # type: ignore[operator]
    show(rows, "ranks", "mbit", "variant", "ttft_s", "MB received", "comm_s", "exposed_comm_s",
         "exposed_share")  # fmt: skip
    parameters = {
        "ranks": ranks, "mbit": mbit, "tokens": tokens, "attention": attention,
        "latency_ms": latency_ms, "repeat": repeat, "server": flags.arguments(),
        "text": text.name if text else "Python standard library",
    }  # fmt: skip
    record.write(json_file, "network", parameters, results)
