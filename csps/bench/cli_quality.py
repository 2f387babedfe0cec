"""The `csps bench quality` command."""

import asyncio
import shlex
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from csps.bench import record
from csps.bench.flags import (
    Json,
    Model,
    Ranks,
    ServeFlags,
    Stage,
    Threads,
    attention_kinds,
    lengths,
    show,
)
from csps.bench.measure import ServerFlags
from csps.bench.quality import TASKS, QualityBench, Variant, variants
from csps.bench.quality_prompts import (
    NEEDLE_TASKS,
    Case,
    Haystack,
    Source,
    needle_cases,
    read_sources,
    text_cases,
)
from csps.bench.quality_score import Row, summarize
from csps.bench.server import ServerProcess
from csps.checkpoint.locate import DEFAULT_MODEL, locate
from csps.checkpoint.tokenizer import Tokenizer, load_tokenizer
from csps.core.attention import AttentionKind, AttentionParams, CsaConfig, Estimate, Wire
from csps.core.config import DType
from csps.core.errors import ConfigError, InvalidRequestError

OF_SERVE = "As csps serve's flag of that name."


def quality(
    tasks: Annotated[str, typer.Option(help=f"By commas: {', '.join(TASKS)}.")] = ",".join(TASKS),
    tokens: Annotated[str, typer.Option(help="Prompt lengths, by commas.")] = "4096,7400",
    attention: Annotated[
        str, typer.Option(help="Ways to attend, by commas: dense, csa, csa-distance.")
    ] = "dense,csa",
    gamma: Annotated[
        str | None, typer.Option(help="Each makes a csa, by commas; default: the server's.")
    ] = None,
    window: Annotated[
        str | None, typer.Option(help="Each makes a csa-distance, by commas; default: as gamma.")
    ] = None,
    prompts: Annotated[
        int, typer.Option(min=1, help="Prompts of each needle task and length.")
    ] = 20,
    texts: Annotated[int, typer.Option(min=1, help="Stretches of text for ppl and agreement.")] = 6,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Real text, repeatable; default: source of Python's standard library."),
    ] = None,
    ranks: Ranks = 2,
    threads_per_rank: Threads = 1,
    model: Model = DEFAULT_MODEL,
    dtype: DType = DType.BFLOAT16,
    stage_tokens: Stage = 8192,
    csa_wire: Annotated[Wire | None, typer.Option(help=OF_SERVE)] = None,
    csa_rows: Annotated[int | None, typer.Option(help=OF_SERVE)] = None,
    csa_estimate: Annotated[Estimate | None, typer.Option(help=OF_SERVE)] = None,
    csa_min_recall: Annotated[float | None, typer.Option(help=OF_SERVE)] = None,
    serve: ServeFlags = "",
    seed: Annotated[int, typer.Option(help="Of the needles, their keys and their haystacks.")] = 0,
    json_file: Json = None,
) -> None:
    """What sparse prefill loses: needles found, perplexity and greedy tokens, beside dense.

    All ways to attend meet the same prompts in one server. What was measured is kept when the
    bench is ended early.
    """
    chosen_tasks = _tasks(tasks)
    nums_tokens = lengths("--tokens", tokens)
    chosen = _variants(attention, gamma, window)
    if {"ppl", "agreement"} & {*chosen_tasks} and chosen[0].kind is not AttentionKind.DENSE:
        raise ConfigError(
            "--attention: ppl and agreement compare with dense, which is not among it"
        )
    csa = _csa_flags(csa_wire, csa_rows, csa_estimate, csa_min_recall)
    extra = (*csa, *shlex.split(serve))
    flags = ServerFlags(model, ranks, threads_per_rank, dtype, stage_tokens, extra)
    record.check_writable(json_file)
    sources = read_sources(text or [])
    tokenizer = load_tokenizer(locate(model))
    cases, total_tokens = _cases(
        tokenizer, sources, chosen_tasks, nums_tokens, prompts, texts, seed
    )
    parameters = {
        "tasks": tasks, "tokens": tokens, "attention": attention, "gamma": gamma,
        "window": window, "prompts": prompts, "texts": texts, "seed": seed,
        "text": [source.name for source in sources], "server": flags.arguments(),
    }  # fmt: skip

    def save(rows: Sequence[Row], complete: bool = False) -> None:
        found = {
            "complete": complete, "summary": summarize(rows, chosen_tasks), "prompts": rows
        }  # fmt: skip
        record.write(json_file, "quality", parameters, found)

    bench = QualityBench(flags, cases, total_tokens, chosen_tasks, chosen, tokenizer.decode, save)
    complete = False
    try:
        with ServerProcess(*flags.arguments()) as server:
            asyncio.run(bench.run(server.target, max(nums_tokens), Console(stderr=True)))
        complete = True
    finally:
        # Whatever ended it: what was measured is worth having.
        if bench.rows:
            save(bench.rows, complete)
            _show(bench.rows, chosen_tasks)


def _tasks(words: str) -> list[str]:
    chosen = list(dict.fromkeys(words.split(",")))
    if not {*chosen} <= {*TASKS}:
        raise ConfigError(f"--tasks: expected some of {', '.join(TASKS)}, got {words!r}")
    return chosen


def _variants(attention: str, gamma: str | None, window: str | None) -> list[Variant]:
    kinds = attention_kinds(attention)
    for flag, value, kind in (
        ("--gamma", gamma, AttentionKind.CSA),
        ("--window", window, AttentionKind.CSA_DISTANCE),
    ):
        if value is not None and kind not in kinds:
            raise ConfigError(f"{flag}: is of {kind}, which is not in --attention {attention}")
    windows = [] if window is None else lengths("--window", window)
    chosen = variants(kinds, _gammas(gamma), list(dict.fromkeys(windows)))
    for blocks in windows:
        try:
            AttentionParams(window_blocks=blocks).validate()
        except InvalidRequestError as error:
            raise ConfigError(f"--window: {error.problem}") from None
    return chosen


def _gammas(text: str | None) -> list[float]:
    if text is None:
        return []
    try:
        gammas = [float(part) for part in text.split(",")]
        for gamma in gammas:
            AttentionParams(gamma=gamma).validate()
    except InvalidRequestError as error:
        raise ConfigError(f"--gamma: {error.problem}") from None
    except ValueError:
        raise ConfigError(f"--gamma: expected shares such as 0.9,0.95, got {text!r}") from None
    return list(dict.fromkeys(gammas))


def _csa_flags(
    wire: Wire | None, rows: int | None, estimate: Estimate | None, min_recall: float | None
) -> list[str]:
    """Flags of csps serve; ConfigError here already, not from the server's log."""
    default = CsaConfig()
    CsaConfig(
        rows_per_tile=default.rows_per_tile if rows is None else rows,
        min_recall=default.min_recall if min_recall is None else min_recall,
    ).validate()
    values = {
        "--csa-wire": wire, "--csa-rows": rows, "--csa-estimate": estimate,
        "--csa-min-recall": min_recall,
    }  # fmt: skip
    given = [(flag, str(value)) for flag, value in values.items() if value is not None]
    return list(chain.from_iterable(given))


def _cases(
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    tasks: Sequence[str],
    nums_tokens: Sequence[int],
    prompts: int,
    texts: int,
    seed: int,
) -> tuple[Iterator[Case], int]:
    """All prompts, made as they are needed, and their tokens.

    ConfigError now if a length is too short for its needles or a text for its length.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=True)

    haystack = Haystack(sources)
    needles = [
        (task, num_tokens) for num_tokens in nums_tokens for task in tasks if task in NEEDLE_TASKS
    ]
    for task, num_tokens in needles:
        next(needle_cases(task, haystack, encode, num_tokens, 1, seed))
    of_text: list[Case] = []
    if {"ppl", "agreement"} & {*tasks}:
        for num_tokens in nums_tokens:
            of_text += text_cases(sources, encode, num_tokens, texts)
    of_needles = (
        needle_cases(task, haystack, encode, num_tokens, prompts, seed)
        for task, num_tokens in needles
    )
    total = sum(prompts * num_tokens for _, num_tokens in needles)
    total += sum(case.tokens for case in of_text)
    return chain(chain.from_iterable(of_needles), of_text), total


def _show(rows: Sequence[Row], tasks: Sequence[str]) -> None:
    """Three tables, each narrow enough for a terminal: score, what was kept, what it cost."""
    columns = {
        "score": "score",
        "density": "density", "union_density": "union", "recall_mean": "recall",
        "recall_low": "low", "recall_p5": "p5",
        "dense_share": "dense", "widened_share": "widened", "ttft_s": "ttft_s",
        "received_over_dense_kv_mean": "of KV", "received_over_dense_kv_max": "most",
    }  # fmt: skip
    results = [
        {"": f"{result['task']} {result['tokens']} {result['variant']}"}
        | {column: _cell(result[name]) for name, column in columns.items()}
        for result in summarize(rows, tasks)
    ]
    show(results, "", "score")
    show(results, "", "density", "union", "recall", "low", "p5")
    show(results, "", "dense", "widened", "ttft_s", "of KV", "most")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
