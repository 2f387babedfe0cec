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
from csps.bench.layouts import LayoutsBench, Run
from csps.bench.layouts_score import Row, error_table, read_steps, size_table
from csps.bench.measure import ServerFlags
from csps.checkpoint.locate import DEFAULT_MODEL
from csps.core.config import DType
from csps.records.rows import STEPS_FILE

MAX_RUNNING = 256
TOKEN_BUDGET = 2048


def layouts(
    sizes: Annotated[
        str, typer.Option(help="Streams at a time, by commas.")
    ] = "1,2,4,8,16,32,64,128,256",
    context: Annotated[int, typer.Option(min=2, help="Prompt tokens of a stream.")] = 64,
    output: Annotated[int, typer.Option(min=3, help="Tokens of a stream.")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each size.")] = 2,
    ranks: Annotated[int, typer.Option(min=2, help="Ranks of the server.")] = 2,
    threads_per_rank: Threads = 1,
    model: Model = DEFAULT_MODEL,
    dtype: DType = DType.BFLOAT16,
    serve: ServeFlags = "",
    text: Annotated[
        Path | None, typer.Option(help="Real text; default: source of Python's standard library.")
    ] = None,
    json_file: Json = None,
) -> None:
    """The layout that the cost model chooses for decode steps, beside the other one.

    A server of --strategy shift gets batches of equal streams. Of every two steps one has the
    layout that its cost model chose, by the steps it measured when it started, and the next one
    the other: sp splits the step's tokens over the ranks, tp the weights. Shown are, by size of
    batch, what steps took in each, how much time the choices took over the better layout's, and
    how far predictions were from measured times. What was measured is kept when the bench is
    ended early.
    """
    nums_streams = list(dict.fromkeys(lengths("--sizes", sizes)))
    extra = (
        *("--strategy", "shift", "--token-budget", str(TOKEN_BUDGET)),
        *("--max-running", str(max(MAX_RUNNING, *nums_streams)), *shlex.split(serve)),
    )
    flags = ServerFlags(model, ranks, threads_per_rank, dtype, TOKEN_BUDGET, extra)
    record.check_writable(json_file)
    # Every batch has another part of the text.
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
        log = Path(directory) / STEPS_FILE
        bench = LayoutsBench(flags, nums_streams, rounds, prompts, output, log, report)
        complete = False
        try:
            bench.run()
            complete = True
        finally:
            # Whatever ended it: what was measured is worth having.
            if bench.runs:
                results = score(bench.runs, log.parent, complete)
                record.write(json_file, "layouts", asked, results)
                _show(results)


def score(runs: Sequence[Run], folder: Path, complete: bool) -> Row:
    """Everything the record holds."""
    steps = read_steps(folder, runs)
    return {
        "complete": complete,
        "sizes": size_table(steps),
        "errors": error_table(steps),
        "runs": [run._asdict() for run in runs],
        "steps": [step._asdict() for step in steps],
    }


def _show(results: Row) -> None:
    """Two tables: times by size, errors of prediction."""
    times = []
    for row in results["sizes"]:  # type: ignore[attr-defined]
        ratio = row["sp_over_tp"]
        times.append(
            {"streams": row["size"]}
            | {f"step_ms {name}": value for name, value in row["step_ms_p50"].items()}
            | {
                "sp / tp": f"{ratio['p50']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
                "chosen": ", ".join(f"{name} {n}" for name, n in row["chosen"].items()),
                "over the better": row["over_better"],
            }
        )
    for table in (times, results["errors"]):
        if table:
            show(table, *table[0])  # type: ignore[arg-type, misc]
