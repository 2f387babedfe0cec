"""The `csps bench prefix` command."""

import asyncio
import shlex
from pathlib import Path
from typing import Annotated

import typer

from csps.bench import record
from csps.bench.corpus import corpus_ids
from csps.bench.flags import (
    Json,
    Model,
    Ranks,
    ServeFlags,
    Threads,
    parameters,
    show,
    strategy_names,
)
from csps.bench.measure import ServerFlags
from csps.bench.prefix import prefix as measure
from csps.checkpoint.locate import DEFAULT_MODEL
from csps.core.config import DType


def prefix(
    tokens: Annotated[int, typer.Option(min=64, help="Length of a document.")] = 4096,
    question: Annotated[int, typer.Option(min=1, help="Length of each question.")] = 64,
    documents: Annotated[int, typer.Option(min=1, help="Documents, each asked about twice.")] = 3,
    strategies: Annotated[
        str, typer.Option(help="By commas: csps, ring, sarathi, shift.")
    ] = "csps,ring,sarathi,shift",
    ranks: Ranks = 2,
    threads_per_rank: Threads = 1,
    model: Model = DEFAULT_MODEL,
    dtype: DType = DType.BFLOAT16,
    stage_tokens: Annotated[
        int, typer.Option(min=1, help="New tokens of one prefill step.")
    ] = 8192,
    serve: ServeFlags = "",
    text: Annotated[
        Path | None, typer.Option(help="Real text; default: source of Python's standard library.")
    ] = None,
    json_file: Json = None,
) -> None:
    """TTFT of a new question about a document that is in the prefix cache, over that of the first.

    Attention and schedule are each strategy's own defaults.
    """
    names = [name.value for name in strategy_names(strategies)]
    record.check_writable(json_file)
    flags = ServerFlags(
        model, ranks, threads_per_rank, dtype, stage_tokens, tuple(shlex.split(serve))
    )
    ids = corpus_ids(model, documents * tokens + 2 * question, text)
    books = [ids[i * tokens : (i + 1) * tokens] for i in range(documents)]
    rest = ids[documents * tokens :]
    rows = asyncio.run(measure(flags, names, books, [rest[:question], rest[question:]]))
    show(rows, "strategy", "cold_ttft_s", "warm_ttft_s", "warm/cold", "cached_tokens")
    given = parameters(
        flags, text, 0, tokens=tokens, question=question, documents=documents, strategies=names
    )
    record.write(json_file, "prefix", given, rows)
