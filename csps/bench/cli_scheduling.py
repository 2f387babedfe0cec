"""The `csps bench scheduling` command."""

import asyncio
import shlex
from typing import Annotated

import typer

from csps.bench import record
from csps.bench.flags import (
    Json,
    Model,
    Ranks,
    Seed,
    ServeFlags,
    Stage,
    Text,
    Threads,
    lengths,
    parameters,
    show,
    strategy_names,
)
from csps.bench.measure import ServerFlags, prompt_ids
from csps.bench.scheduling import Load
from csps.bench.scheduling import scheduling as measure
from csps.checkpoint.locate import DEFAULT_MODEL
from csps.core.config import DType


def scheduling(
    batch: Annotated[str, typer.Option(help="Streams side by side, by commas.")] = "1,8",
    context: Annotated[int, typer.Option(min=1, help="Tokens before each stream's output.")] = 256,
    output: Annotated[int, typer.Option(min=8, help="Tokens of each stream.")] = 100,
    repeats: Annotated[int, typer.Option(min=1, help="Servers of each way, in turn.")] = 3,
    strategies: Annotated[str, typer.Option(help="By commas, some of csps's strategies.")] = "ring",
    ranks: Ranks = 1,
    threads_per_rank: Threads = 1,
    model: Model = DEFAULT_MODEL,
    dtype: DType = DType.BFLOAT16,
    stage_tokens: Stage = 8192,
    serve: ServeFlags = "",
    text: Text = None,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Time between tokens with decode planned one step ahead, over that with each step planned
    when the one before has ended.
    """
    names = strategy_names(strategies)
    load = Load(tuple(lengths("--batch", batch)), context, output, repeats)
    record.check_writable(json_file)
    flags = ServerFlags(
        model, ranks, threads_per_rank, dtype, stage_tokens, tuple(shlex.split(serve))
    )
    ids = prompt_ids(model, context + max(load.batches), text, seed)
    rows = asyncio.run(measure(flags, names, load, ids))
    show(rows, "strategy", "batch", "async_tbt_ms", "sync_tbt_ms", "async/sync")
    given = parameters(
        flags, text, seed, context=context, output=output, repeats=repeats, strategies=names
    )
    record.write(json_file, "scheduling", given, rows)
