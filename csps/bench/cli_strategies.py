"""The `csps bench strategies` command."""

import asyncio
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from csps.bench import record
from csps.bench.corpus import corpus_ids
from csps.bench.flags import Json, Model, lengths, show
from csps.bench.server import ServerProcess
from csps.bench.strategies import FOR_TWO_CORES, Configuration, Playback
from csps.bench.strategies_load import Mix, arrivals, cut
from csps.bench.strategies_score import (
    BEST_RULE,
    LOWER_BOUNDS,
    Row,
    mark_best,
    request_rows,
    summarize,
)
from csps.checkpoint.locate import DEFAULT_MODEL
from csps.core.config import DType
from csps.core.errors import ConfigError

LONG_WARM_UP = 2048  # tokens; sparse prefill begins there


def strategies(
    config: Annotated[
        list[str] | None,
        typer.Option(
            help="A server to compare, repeatable: NAME=FLAGS of csps serve, such as "
            "'tp2-512=--strategy sarathi --workers 2 --token-budget 512'. Default: for two "
            "cores, csps (three sizes of a prefill step), ring, sarathi (one rank with two "
            "threads and three token budgets, or two ranks) and shift (two token budgets)."
        ),
    ] = None,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds of arrivals.")] = 300.0,
    drain: Annotated[
        float, typer.Option(min=0.0, help="Seconds for what has not ended by then.")
    ] = 180.0,
    chat_rate: Annotated[float, typer.Option(min=1e-3, help="Chats per second.")] = 0.3,
    chat_tokens: Annotated[str, typer.Option(help="Prompts of chats, LOW-HIGH.")] = "64-256",
    chat_output: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 48,
    doc_every: Annotated[float, typer.Option(min=0.1, help="Seconds between documents.")] = 45.0,
    doc_tokens: Annotated[str, typer.Option(help="Their lengths by turns.")] = "4096,8000",
    doc_output: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 32,
    model: Model = DEFAULT_MODEL,
    dtype: DType = DType.BFLOAT16,
    serve: Annotated[
        str, typer.Option("--serve", help="Flags of csps serve for all of them.")
    ] = "",
    text: Annotated[
        Path | None, typer.Option(help="Real text; default: source of Python's standard library.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the chats' times and lengths.")] = 0,
    json_file: Json = None,
) -> None:
    """Strategies under one mixed load: how long chats and documents wait, and for what.

    Short chats come at random times over a steady stream of long documents, at the same times
    and with the same prompts to each configuration in turn; none waits for another's answer, as
    users do not. Attention is each strategy's own: sparse for csps, exact for the others, unless
    a configuration says otherwise. No two prompts begin alike, so a prefix cache has nothing.

    The best configuration of each strategy is marked: fewest failed requests, then the lowest
    mean response time. Configurations that were measured are kept when the bench is ended early.
    """
    configurations = parse_configurations(config or FOR_TWO_CORES)
    mix = Mix(
        duration, chat_rate, _range("--chat-tokens", chat_tokens), chat_output,
        doc_every, tuple(lengths("--doc-tokens", doc_tokens)), doc_output,
    )  # fmt: skip
    record.check_writable(json_file)
    load = arrivals(mix, seed)
    sizes = [arrival.num_tokens for arrival in load]
    warm_ups = [mix.chat_tokens[0], min(LONG_WARM_UP, max(mix.doc_tokens))]
    texts = cut(corpus_ids(model, sum(sizes) + sum(warm_ups), text), [*warm_ups, *sizes])
    base = ("--model", model, "--dtype", dtype.value, "--log-level", "WARNING", *shlex.split(serve))
    parameters = {
        "duration": duration, "drain": drain, "chat_rate": chat_rate, "chat_tokens": chat_tokens,
        "chat_output": chat_output, "doc_every": doc_every, "doc_tokens": doc_tokens,
        "doc_output": doc_output, "seed": seed, "server": base,
        "text": text.name if text else "Python standard library",
    }  # fmt: skip
    rows: list[Row] = []
    console = Console(stderr=True)
    try:
        for number, chosen in enumerate(configurations, 1):
            where = f"[{number}/{len(configurations)}] {chosen.name}: "
            report = partial(_report, console, where)
            playback = Playback(load, texts[len(warm_ups) :], texts[: len(warm_ups)], drain, report)
            rows.append(_measure(chosen, base, playback, mix.longest))
            results = {
                "complete": number == len(configurations), "best": BEST_RULE,
                "lower_bounds": LOWER_BOUNDS, "configurations": mark_best(rows),
            }  # fmt: skip
            record.write(json_file, "strategies", parameters, results)
    finally:
        # Whatever ended it: what was measured is worth seeing.
        if rows:
            _show(mark_best(rows))


def _report(console: Console, where: str, text: str) -> None:
    console.print(where + text, markup=False, highlight=False)


def _measure(chosen: Configuration, base: Sequence[str], playback: Playback, longest: int) -> Row:
    playback.report("starting")
    with ServerProcess(*base, *chosen.flags) as server:
        strategy, samples = asyncio.run(playback.run(server.target, longest))
    return {
        "name": chosen.name, "strategy": strategy, "flags": chosen.flags,
        **summarize(samples), "requests": request_rows(samples),
    }  # fmt: skip


def parse_configurations(texts: Sequence[str]) -> list[Configuration]:
    """From NAME=FLAGS each; ConfigError if one is not, or a name comes twice."""
    found: dict[str, Configuration] = {}
    for text in texts:
        name, equals, flags = text.partition("=")
        name = name.strip()
        if not equals or not name or name.startswith("-"):
            raise ConfigError(f"--config: expected NAME=FLAGS OF SERVE, got {text!r}")
        if name in found:
            raise ConfigError(f"--config: {name} comes twice")
        try:
            found[name] = Configuration(name, tuple(shlex.split(flags)))
        except ValueError as error:
            raise ConfigError(f"--config: {text!r}: {error}") from None
    return list(found.values())


def _range(flag: str, text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
        raise ConfigError(f"{flag}: expected a range such as 64-256, got {text!r}")
    return int(low), int(high)


def _show(rows: Sequence[Row]) -> None:
    """Three tables, each narrow enough for a terminal: waiting, streaming, the whole."""
    first, gaps, whole = [], [], []
    for row in rows:
        for kind, figures in row["figures"].items():  # type: ignore[attr-defined]
            name = {"": f"{row['name']} {kind}"}
            ttft, tbt, most = figures["ttft_s"], figures["tbt_ms"], figures["tbt_ms_max"]
            counts = {"count": figures["count"], "failed": figures["failed"]}
            first.append(name | counts | {f"ttft_s {key}": _cell(ttft[key]) for key in ttft})
            gaps.append(
                name
                | {f"tbt_ms {key}": _cell(tbt[key]) for key in tbt}
                | {"max, mean": _cell(most["mean"])}
            )
        response = row["figures"]["all"]["response_s"]  # type: ignore[index]
        whole.append(
            {"": f"{row['name']}{' (best)' if row['best'] else ''}"}
            | {f"response_s {key}": _cell(response[key]) for key in response}
            | {"prefill tok/s": row["prefill_tok_s"], "output tok/s": row["output_tok_s"]}
        )
    for table in (first, gaps, whole):
        show(table, *table[0])


def _cell(value: float | None) -> object:
    return "-" if value is None else value
