"""The `csps bench traffic` command."""

import asyncio
from typing import Annotated

import typer

from csps.bench import record
from csps.bench.flags import Json, Model, Ranks, Seed, Threads, parameters, show
from csps.bench.measure import ServerFlags, prompt_ids
from csps.bench.traffic import traffic as measure
from csps.checkpoint.locate import DEFAULT_MODEL
from csps.core.config import DType


def traffic(
    tokens: Annotated[int, typer.Option(min=512, help="Length of the prompt.")] = 2048,
    output: Annotated[int, typer.Option(min=1, help="Tokens that are decoded.")] = 16,
    ranks: Ranks = 2,
    threads_per_rank: Threads = 1,
    model: Model = DEFAULT_MODEL,
    dtype: DType = DType.BFLOAT16,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Bytes that each strategy moves in prefill and in decode, counted, over what its formula says.

    The ranks count what they send. Formulas are those of docs/strategies.md, all ranks and layers
    together, dense attention, the prompt in one step: every ratio should be 1.
    """
    record.check_writable(json_file)
    flags = ServerFlags(model, ranks, threads_per_rank, dtype, tokens * 2)
    prompt = prompt_ids(model, tokens, None, seed)
    rows = asyncio.run(measure(flags, prompt, output))
    show(rows, "case", "phase", "tokens", "counted", "formula", "ratio")
    given = parameters(flags, None, seed, tokens=tokens, output=output)
    record.write(json_file, "traffic", given, rows)
