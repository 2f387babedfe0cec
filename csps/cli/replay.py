"""`csps replay`: a trace to a live server."""

import asyncio
import importlib
from pathlib import Path
from typing import Annotated

import typer

from csps.checkpoint.locate import DEFAULT_MODEL
from csps.cli.api_keys import ClientKeyFile, client_key
from csps.cli.terminal import console
from csps.cli.tls import Tls, TlsCa, read_client_tls
from csps.core.attention import AttentionKind
from csps.rpc.client import AttentionChoice


def replay(
    trace: Annotated[
        Path, typer.Argument(help="A trace, in any format that csps trace convert reads.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the run's records; must not hold a run.")],
    target: Annotated[str, typer.Option(help="HOST:PORT of the server.")] = "127.0.0.1:50051",
    api_key_file: ClientKeyFile = None,
    tls_ca: TlsCa = None,
    tls: Tls = False,
    speed: Annotated[
        float, typer.Option(min=1e-6, help="Play so many times as fast as the trace's clock.")
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the prompts' tokens: another seed shares nothing.")
    ] = 0,
    text: Annotated[
        Path | None,
        typer.Option(help="Cut prompts from this text, so that attention is that of real text."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="With --text: the server's model, for its tokenizer.")
    ] = DEFAULT_MODEL,
    attention: Annotated[
        AttentionKind | None,
        typer.Option(help="How prompts are prefilled; default: the server's choice."),
    ] = None,
    drain: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Seconds to wait for what runs when all is sent; default: its end."
        ),
    ] = None,
    slo_ttft: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds to the first token that count as good.")
    ] = None,
    slo_tbt: Annotated[
        float | None, typer.Option(min=0.0, help="Milliseconds between tokens, likewise.")
    ] = None,
    capacity: Annotated[
        bool,
        typer.Option(
            "--find-capacity",
            help="Search the speed at which the --slo-... are just met, a run of its own for each "
            "speed that is tried, from --speed / 8 on.",
        ),
    ] = False,
    tolerance: Annotated[float, typer.Option(min=0.001, help="Of the capacity, relative.")] = 0.1,
    name: Annotated[
        str | None, typer.Option(help="Of the run in comparisons; default: strategy and trace.")
    ] = None,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Leave out bad rows and requests beyond the context."),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the summary here besides.")
    ] = None,
) -> None:
    """Send a trace to a server, on the trace's clock, and record what comes back.

    csps trace scale conversation.jsonl --divide 32 --out small.jsonl

    csps replay small.jsonl --target 127.0.0.1:50051 --out runs/csps --speed 2

    csps compare runs/csps runs/sarathi --out report

    csps replay small.jsonl --out runs/capacity --find-capacity --slo-tbt 500 --slo-ttft 20

    Requests are sent when their time has come, whatever the answers do (open loop). Blocks with
    the same id become the same tokens, so that what the trace shares is shared, and nothing
    else. Ctrl-C ends the run and writes what there is.
    """
    run = importlib.import_module("csps.replay.run")
    schema = importlib.import_module("csps.trace.schema")
    formats = importlib.import_module("csps.trace.formats")
    loaded, bad = formats.read_any(trace, skip_bad=skip_bad)
    if bad:
        console.print(f"{len(bad)} bad rows are left out:", highlight=False)
        console.print(schema.bad_rows_text(trace, bad), highlight=False, soft_wrap=True)
    config = run.ReplayConfig(
        target=target,
        api_key=client_key(api_key_file),
        tls=read_client_tls(tls_ca, tls),
        out=out,
        speed=speed,
        seed=seed,
        drain_s=drain,
        text=text,
        model=model,
        attention=AttentionChoice(attention),
        slo_ttft_s=slo_ttft,
        slo_tbt_ms=slo_tbt,
        name=name,
        skip_bad=skip_bad,
    )
    if capacity:
        search = importlib.import_module("csps.replay.capacity").find
        summary = search(loaded, config, console, tolerance)
    else:
        summary = asyncio.run(run.replay(loaded, config, console, len(bad)))
    if json_file is not None:
        importlib.import_module("csps.records.summary").save(json_file, summary)
    console.print(f"records are in {out}", highlight=False, soft_wrap=True)
