"""The `csps trace` commands: make, read, change and describe traces of requests."""

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from csps.cli.terminal import console as messages
from csps.core.errors import ConfigError
from csps.trace.arrivals import ArrivalKind, Arrivals
from csps.trace.formats import Format, read_any
from csps.trace.generate import generate as generate_trace
from csps.trace.profiles import ProfileName
from csps.trace.scale import Scaling
from csps.trace.scale import scale as scale_trace
from csps.trace.schema import BadRow, Trace, bad_rows_text, write_trace
from csps.trace.stats import Lengths, TraceStats, trace_stats

DEFAULT_REQUESTS = 1000
BURSTS = Arrivals()  # their defaults

app = typer.Typer(
    help="Make, convert, change and describe traces of requests (traces/README.md).",
    no_args_is_help=True,
)

File = Annotated[Path, typer.Argument(metavar="TRACE", help="A trace of any known format.")]
Out = Annotated[Path, typer.Option(help="Where the trace is written (JSON lines).")]
FormatFlag = Annotated[
    Format, typer.Option("--format", help="Of the file; auto looks at its first line.")
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Name bad rows and leave them out, in place of failing.")
]
BlockTokens = Annotated[
    int,
    typer.Option(min=1, help="Tokens of a Mooncake block, or of those a CSV's prompts are given."),
]


@app.command()
def generate(
    profile: Annotated[ProfileName, typer.Argument(help="What its sessions look like.")],
    out: Out,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Stop after so many; default, without --duration: {DEFAULT_REQUESTS}."
        ),
    ] = None,
    duration: Annotated[
        float | None, typer.Option(help="Stop at so many seconds of the trace's clock.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second; default: the profile's.")
    ] = None,
    arrivals: Annotated[
        ArrivalKind | None, typer.Option(help="How sessions arrive; default: the profile's.")
    ] = None,
    cv: Annotated[
        float, typer.Option(help="gamma: coefficient of variation of interarrival times.")
    ] = BURSTS.cv,
    on: Annotated[float, typer.Option(help="on-off: mean seconds of a burst.")] = BURSTS.on_s,
    off: Annotated[float, typer.Option(help="on-off: mean seconds between bursts.")] = BURSTS.off_s,
    seed: Annotated[int, typer.Option(help="The same seed gives the same file.")] = 0,
) -> None:
    """Draw a trace from a profile that is fitted to a published one.

    csps trace generate chat_long --out chat.jsonl

    csps trace generate doc_qa --duration 600 --rate 1.5 --seed 7 --out docs.jsonl

    csps trace generate reason_long --arrivals on-off --on 10 --off 30 --out bursts.jsonl

    chat_long: conversations that grow. doc_qa: documents, some asked about several times.
    api_heavy_tail: unrelated requests in bursts. reason_long: long prompts, longer answers.
    """
    if requests is None and duration is None:
        requests = DEFAULT_REQUESTS
    how = None if arrivals is None else Arrivals(arrivals, cv, on, off)
    trace = generate_trace(profile, seed, rate, how, requests, duration)
    _write(out, trace)


@app.command()
def convert(
    trace: File,
    out: Out,
    format: FormatFlag = Format.AUTO,
    rate: Annotated[
        float | None,
        typer.Option(help="Poisson arrivals per second, for lengths without arrival times."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of those arrivals.")] = 0,
    block_tokens: BlockTokens = 512,
    skip_bad: SkipBad = False,
) -> None:
    """Bring a trace of another maker into the one schema.

    csps trace convert conversation_trace.jsonl --out conversation.jsonl

    csps trace convert AzureLLMInferenceTrace_code.csv --out azure.jsonl

    csps trace convert arxiv_lengths.csv --rate 0.5 --seed 1 --out arxiv.jsonl
    """
    read = read_any(trace, format, rate, seed, block_tokens, skip_bad)
    _write(out, _report_bad(trace, read))


@app.command()
def scale(
    trace: File,
    out: Out,
    divide: Annotated[
        int, typer.Option(help="Divide lengths and block size; lengths round up.")
    ] = 1,
    divide_output: Annotated[
        int | None, typer.Option(help="Divide output lengths by this in place of --divide.")
    ] = None,
    max_prompt: Annotated[
        int | None, typer.Option(help="Cut longer prompts here, after dividing.")
    ] = None,
    speed: Annotated[float, typer.Option(help="Arrivals so many times as fast.")] = 1.0,
    from_s: Annotated[
        float, typer.Option("--from", help="Keep the sessions that begin from here on, seconds.")
    ] = 0.0,
    to_s: Annotated[float | None, typer.Option("--to", help="And before here, seconds.")] = None,
    cut: Annotated[
        bool,
        typer.Option(
            "--cut", help="Keep just what arrives in the slice: cuts sessions at its edges."
        ),
    ] = False,
    one_in: Annotated[int, typer.Option(help="Keep one session in so many, whole.")] = 1,
    max_requests: Annotated[int | None, typer.Option(help="Keep the first so many.")] = None,
    format: FormatFlag = Format.AUTO,
    block_tokens: BlockTokens = 512,
    skip_bad: SkipBad = False,
) -> None:
    """Make a trace smaller, shorter or faster; what prompts share stays shared.

    csps trace scale conversation.jsonl --divide 32 --one-in 16 --out small.jsonl

    csps trace scale conversation.jsonl --from 600 --to 900 --cut --out five_minutes.jsonl

    csps trace scale docs.jsonl --divide 16 --divide-output 4 --max-prompt 7000 --speed 0.5
    --out slow.jsonl

    The slice and the samples are taken first, on the clock and sessions of the file. A session
    of a slice is kept whole, so its later turns may arrive after --to, unless --cut.
    """
    scaling = Scaling(
        from_s=from_s,
        to_s=to_s,
        cut=cut,
        one_in=one_in,
        max_requests=max_requests,
        divide=divide,
        divide_output=divide_output,
        max_prompt=max_prompt,
        speed=speed,
    )
    read = read_any(trace, format, block_tokens=block_tokens, skip_bad=skip_bad)
    _write(out, scale_trace(_report_bad(trace, read), scaling))


@app.command()
def stats(
    trace: File,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers here.")
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(help="Draw lengths, arrivals and prompts over time: a .png or .svg."),
    ] = None,
    format: FormatFlag = Format.AUTO,
    block_tokens: BlockTokens = 512,
    skip_bad: SkipBad = False,
) -> None:
    """Lengths, rate, burstiness and shared prefixes of a trace.

    csps trace stats conversation.jsonl --figure conversation.svg

    csps trace stats AzureLLMInferenceTrace_code.csv --json azure_stats.json
    """
    read = _report_bad(trace, read_any(trace, format, block_tokens=block_tokens, skip_bad=skip_bad))
    numbers = trace_stats(read)
    if json_file:
        try:
            json_file.write_text(json.dumps(asdict(numbers), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json: {json_file}: {error.strerror}") from None
    if figure:
        # Loaded by name: matplotlib takes a second that no other command should wait for.
        drawing = importlib.import_module("csps.trace.figure")
        drawing.draw_trace(read, figure)
    for table in _tables(numbers):
        Console().print(table)


def _report_bad(path: Path, read: tuple[Trace, Sequence[BadRow]]) -> Trace:
    trace, bad = read
    if bad:
        messages.print(bad_rows_text(path, bad), style="yellow", markup=False, soft_wrap=True)
        messages.print(f"left out {len(bad)} bad rows, kept {len(trace.requests)}")
    return trace


def _write(out: Path, trace: Trace) -> None:
    write_trace(out, trace)
    last_s = trace.requests[-1].arrival_s
    messages.print(f"{out}: {len(trace.requests):,} requests in {last_s:,.1f} s", soft_wrap=True)


def _tables(stats: TraceStats) -> tuple[Table, Table]:
    lengths = Table(title=stats.name, title_justify="left")
    lengths.add_column("tokens")
    for column in ("mean", "p50", "p90", "p99", "max", "total"):
        lengths.add_column(column, justify="right")
    lengths.add_row("prompt", *_cells(stats.prompt), f"{stats.prompt_tokens:,}")
    lengths.add_row("output", *_cells(stats.output), f"{stats.output_tokens:,}")
    others = Table(show_header=False)
    others.add_column()
    others.add_column(justify="right")
    others.add_row("requests", f"{stats.requests:,}")
    others.add_row("sessions", f"{stats.sessions:,}")
    others.add_row("turns of a session: mean, max", f"{stats.turns_mean:.2f}, {stats.turns_max}")
    others.add_row("first to last arrival", f"{stats.duration_s:,.1f} s")
    others.add_row("rate", f"{stats.rate:.3g}/s")
    others.add_row("CV of interarrival times", f"{stats.interarrival_cv:.2f}")
    others.add_row("prefix hit, infinite cache", f"{stats.prefix_hit:.1%}")
    others.add_row("block", f"{stats.block_tokens} tokens")
    return lengths, others


def _cells(lengths: Lengths) -> list[str]:
    counts = (lengths.p50, lengths.p90, lengths.p99, lengths.max)
    return [f"{lengths.mean:,.0f}", *(f"{tokens:,}" for tokens in counts)]
