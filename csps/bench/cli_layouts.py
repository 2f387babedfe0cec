"""The `csps bench layouts` command."""

import shlex
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from csps.bench import record
from csps.bench.corpus import corpus_ids
from csps.bench.flags import Json, Model, ServeFlags, Threads, lengths, parameters, show
from csps.bench.layouts import MODEL, VARIANTS, LayoutsBench, Run
from csps.bench.layouts_score import (
    Row,
    error_table,
    errors_of_chosen,
    errors_on_fixed,
    read_steps,
    size_table,
)
from csps.bench.measure import ServerFlags
from csps.checkpoint.locate import DEFAULT_MODEL
from csps.core.config import DType

MAX_RUNNING = 256
TOKEN_BUDGET = 2048


def layouts(
    sizes: Annotated[
        str, typer.Option(help="Streams at a time, by commas.")
    ] = "1,2,4,8,16,32,64,128,256",
    context: Annotated[int, typer.Option(min=2, help="Prompt tokens of a stream.")] = 64,
    output: Annotated[int, typer.Option(min=3, help="Tokens of a stream.")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each size and server.")] = 2,
    ranks: Annotated[int, typer.Option(min=2, help="Ranks of each server.")] = 2,
    threads_per_rank: Threads = 1,
    model: Model = DEFAULT_MODEL,
    dtype: DType = DType.BFLOAT16,
    serve: ServeFlags = "",
    text: Annotated[
        Path | None, typer.Option(help="Real text; default: source of Python's standard library.")
    ] = None,
    json_file: Json = None,
) -> None:
    """The layout that the cost model chooses for each step, beside always sp and always tp.

    Three servers of --strategy shift run at once and take turns: one splits every step's tokens
    over its ranks (sp), one its weights (tp), one does what its cost model predicts to be
    cheaper, by the steps it measured when it started. Each gets the same batches of equal
    streams. Shown are the time between tokens, the model's over that of the better fixed layout,
    and how far predictions were from the measured times of all steps since.

    "on fixed" compares them with steps of the other two servers that had the shape of one of the
    model's: so also for the layout it did not choose. What was measured is kept when the bench
    is ended early.
    """
    nums_streams = list(dict.fromkeys(lengths("--sizes", sizes)))
    extra = (
        *("--strategy", "shift", "--token-budget", str(TOKEN_BUDGET)),
        *("--max-running", str(max(MAX_RUNNING, *nums_streams)), *shlex.split(serve)),
    )
    flags = ServerFlags(model, ranks, threads_per_rank, dtype, TOKEN_BUDGET, extra)
    record.check_writable(json_file)
    # Every batch of a server has another part of the text.
    total = rounds * sum(nums_streams)
    token_ids = corpus_ids(model, total * context, text)
    firsts = [0, *accumulate(nums_streams * rounds)]

    def prompts(round_: int, size: int) -> list[list[int]]:
        first = firsts[round_ * len(nums_streams) + nums_streams.index(size)]
        starts = range(first * context, (first + size) * context, context)
        return [token_ids[start : start + context] for start in starts]

    asked = parameters(flags, text, 0, sizes=sizes, context=context, output=output, rounds=rounds)
    report = partial(Console(stderr=True).print, markup=False, highlight=False)
    with tempfile.TemporaryDirectory(prefix="csps-layouts-") as directory:
        bench = LayoutsBench(flags, nums_streams, rounds, prompts, output, Path(directory), report)
        complete = False
        try:
            bench.run()
            complete = True
        finally:
            # Whatever ended it: what was measured is worth having.
            if bench.runs:
                results = score(bench.runs, Path(directory), complete)
                record.write(json_file, "layouts", asked, results)
                _show(results)


def score(runs: Sequence[Run], logs: Path, complete: bool) -> Row:
    """Everything the record holds."""
    steps = {
        name: read_steps(logs / name, [run for run in runs if run.variant == name])
        for name in VARIANTS
    }
    fixed = [step for name, found in steps.items() if name != MODEL for step in found]
    return {
        "complete": complete,
        "sizes": size_table(runs, steps),
        "errors": error_table(errors_of_chosen(steps[MODEL])),
        "errors_on_fixed": error_table(errors_on_fixed(steps[MODEL], fixed)),
        "num_fixed_steps": len(fixed),
        "runs": [run._asdict() for run in runs],
        "steps": {name: [step._asdict() for step in found] for name, found in steps.items()},
    }


def _show(results: Row) -> None:
    """Two tables: times by size, errors of prediction."""
    times = []
    for row in results["sizes"]:  # type: ignore[attr-defined]
        chosen = ", ".join(f"{name} {count}" for name, count in row["chosen"].items())
        times.append(
            {"streams": row["size"]}
            | {f"tbt_ms {name}": value for name, value in row["tbt_ms_p50"].items()}
            | {"ratio": row["ratio"], "ratio of steps": row["step_ratio"], "chosen": chosen}
        )
    errors = [
        {"errors": name, **row}
        for name, key in (("of chosen", "errors"), ("on fixed", "errors_on_fixed"))
        for row in results[key]  # type: ignore[attr-defined]
    ]
    for table in (times, errors):
        if table:
            show(table, *table[0])
