"""The composition root: flags -> Config -> one role. The only place that reads the environment."""

import asyncio
import faulthandler
import importlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from csps import __version__
from csps.bench.cli import app as bench_app
from csps.checkpoint.locate import DEFAULT_MODEL
from csps.coordinator.frontend import ServedModel
from csps.coordinator.server import Server
from csps.core.attention import AttentionKind, AttentionParams, CsaConfig, Estimate, Wire
from csps.core.config import DType, ServerConfig, WorkerSetup
from csps.core.errors import ConfigError, CspsError, InvalidRequestError
from csps.core.request import SamplingParams
from csps.rpc.client import AttentionChoice
from csps.submit import Submission, read_prompt
from csps.submit import submit as run_submission
from csps.units import parse_bytes

app = typer.Typer(
    name="csps",
    help="Serve language models whose prompts are long documents, split over many ranks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
console = Console(stderr=True)
logger = logging.getLogger(__name__)

SERVE = "Server"
SHAPE = "Model and ranks"
SCHEDULE = "Scheduling"
SPARSE = "Attention of prefill"


@app.command()
def serve(
    model: Annotated[
        str,
        typer.Option(
            help="Hugging Face directory, GGUF file, or the default model's name.",
            rich_help_panel=SHAPE,
        ),
    ] = DEFAULT_MODEL,
    workers: Annotated[
        int, typer.Option(min=0, help="Ranks to start on this machine.", rich_help_panel=SHAPE)
    ] = 1,
    ranks: Annotated[
        int,
        typer.Option(
            min=0,
            help="Ranks in all, when they are joined from outside by torchrun (with --workers 0).",
            rich_help_panel=SHAPE,
        ),
    ] = 0,
    tp: Annotated[
        int,
        typer.Option(
            min=1,
            help="Ranks each weight is split over; the rest of the ranks split the tokens.",
            rich_help_panel=SHAPE,
        ),
    ] = 1,
    dtype: Annotated[
        DType, typer.Option(help="Type of weights, activations and KV.", rich_help_panel=SHAPE)
    ] = DType.BFLOAT16,
    threads_per_rank: Annotated[
        int,
        typer.Option(min=0, help="CPU threads of a rank; 0: cores / ranks.", rich_help_panel=SHAPE),
    ] = 0,
    max_model_len: Annotated[
        int,
        typer.Option(
            min=0, help="Prompt and output together; 0: the model's own.", rich_help_panel=SHAPE
        ),
    ] = 0,
    kv_memory: Annotated[
        str,
        typer.Option(
            help="KV memory of each rank, such as 2GiB; auto: a share of what is free.",
            rich_help_panel=SHAPE,
        ),
    ] = "auto",
    block_size: Annotated[
        int, typer.Option(min=1, help="Tokens of a KV block.", rich_help_panel=SHAPE)
    ] = 64,
    long_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Prompts at least this long are split over all ranks.",
            rich_help_panel=SCHEDULE,
        ),
    ] = 512,
    stage_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="New tokens of one prefill step: a short prompt waits for one step at most.",
            rich_help_panel=SCHEDULE,
        ),
    ] = 4096,
    max_running: Annotated[
        int,
        typer.Option(min=1, help="Requests that hold KV at a time.", rich_help_panel=SCHEDULE),
    ] = 64,
    max_waiting_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Queued prompt tokens above which requests are refused.",
            rich_help_panel=SCHEDULE,
        ),
    ] = 1_000_000,
    attention: Annotated[
        AttentionKind,
        typer.Option(
            help="dense: exact. csa: the KV blocks that hold most of the attention, with measured "
            "recall. csa-distance: near blocks, a baseline. A request may choose another.",
            rich_help_panel=SPARSE,
        ),
    ] = AttentionKind.DENSE,
    csa_gamma: Annotated[
        float,
        typer.Option(help="Share of attention mass csa keeps; 1: all.", rich_help_panel=SPARSE),
    ] = 0.95,
    csa_min_recall: Annotated[
        float,
        typer.Option(
            help="A head whose measured recall may be lower widens gamma, then runs dense.",
            rich_help_panel=SPARSE,
        ),
    ] = 0.90,
    csa_min_tokens: Annotated[
        int,
        typer.Option(min=1, help="Shorter prompts are always dense.", rich_help_panel=SPARSE),
    ] = 2048,
    csa_rows: Annotated[
        int,
        typer.Option(
            help="Query rows per head and block that choose; more choose better and cost more.",
            rich_help_panel=SPARSE,
        ),
    ] = 8,
    csa_estimate: Annotated[
        Estimate,
        typer.Option(
            help="What blocks are chosen by: sampled query rows, or mean keys.",
            rich_help_panel=SPARSE,
        ),
    ] = Estimate.ROWS,
    csa_window: Annotated[
        int,
        typer.Option(help="Blocks csa-distance keeps whole.", rich_help_panel=SPARSE),
    ] = 8,
    csa_wire: Annotated[
        Wire, typer.Option(help="Type of fetched keys and values.", rich_help_panel=SPARSE)
    ] = Wire.MODEL,
    pipeline: Annotated[
        str,
        typer.Option(
            help="on: communicate beside computation. off: one after the other, to compare.",
            rich_help_panel=SPARSE,
        ),
    ] = "on",
    host: Annotated[
        str, typer.Option(help="Address to listen on.", rich_help_panel=SERVE)
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="gRPC port; 0 picks a free one.", rich_help_panel=SERVE
        ),
    ] = 50051,
    control: Annotated[
        str,
        typer.Option(
            help="HOST:PORT where ranks join; keep it inside the cluster.", rich_help_panel=SERVE
        ),
    ] = "127.0.0.1:0",
    collective_timeout: Annotated[
        float,
        typer.Option(
            min=1, help="Seconds after which a stuck collective fails.", rich_help_panel=SERVE
        ),
    ] = 300.0,
    ready_file: Annotated[
        Path | None,
        typer.Option(
            help="Written once the server is ready, as JSON with its port: for scripts.",
            rich_help_panel=SERVE,
        ),
    ] = None,
    log_level: Annotated[
        str, typer.Option(help="DEBUG, INFO, ...", rich_help_panel=SERVE)
    ] = "INFO",
) -> None:
    """Serve a model over gRPC.

    On one machine: csps serve --workers 2. On a cluster: csps serve --workers 0 --ranks 8
    --control 0.0.0.0:9200 here, and on every machine
    torchrun ... -m csps worker --coordinator HERE:9200.
    """
    _start_logging(log_level)
    if bool(workers) == bool(ranks):
        raise ConfigError("--workers, --ranks: give one of them (ranks started here, or joined)")
    num_ranks = workers or ranks
    if num_ranks % tp:
        raise ConfigError(f"--tp: {tp} does not divide the number of ranks, {num_ranks}")
    control_host, _, control_port = control.rpartition(":")
    if not control_host or not control_port.isdigit():
        raise ConfigError(f"--control: expected HOST:PORT, got {control!r}")
    if ready_file is not None and not ready_file.absolute().parent.is_dir():
        raise ConfigError(f"--ready-file: {ready_file}: no such directory")
    default_attention = AttentionParams(attention, csa_gamma, csa_window)
    try:
        default_attention.validate()
    except InvalidRequestError as error:
        raise ConfigError(f"--csa-{error}".replace("attention.", "")) from None
    if pipeline not in ("on", "off"):
        raise ConfigError(f"--pipeline: expected on or off, got {pipeline!r}")
    csa = CsaConfig(
        min_recall=csa_min_recall,
        rows_per_tile=csa_rows,
        estimate=csa_estimate,
        wire=csa_wire,
        pipeline=pipeline == "on",
    )
    csa.validate()
    config = ServerConfig(
        setup=WorkerSetup(
            model=model,
            dtype=dtype,
            block_size=block_size,
            kv_memory_bytes=0 if kv_memory == "auto" else parse_bytes("--kv-memory", kv_memory),
            max_model_len=max_model_len,
            tp=tp,
            threads_per_rank=threads_per_rank,
            collective_timeout_s=collective_timeout,
            csa=csa,
        ),
        num_ranks=num_ranks,
        long_tokens=long_tokens,
        stage_tokens=stage_tokens,
        attention=default_attention,
        csa_min_tokens=csa_min_tokens,
        max_running=max_running,
        max_waiting_tokens=max_waiting_tokens,
        host=host,
        port=port,
        control_host=control_host,
        control_port=int(control_port),
    )
    asyncio.run(_serve(config, start_workers=workers > 0, ready_file=ready_file))


async def _serve(config: ServerConfig, *, start_workers: bool, ready_file: Path | None) -> None:
    server = Server(config, start_workers=start_workers)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.stop)

    def on_ready(server: Server, model: ServedModel, num_blocks: int) -> None:
        address = f"{config.host}:{server.port}"
        console.print(
            f"[bold green]ready[/]: {model.name} on [bold]{address}[/], "
            f"{config.num_ranks} ranks, context {model.max_model_len} tokens, KV for "
            f"{num_blocks * config.setup.block_size * config.sp} tokens",
            soft_wrap=True,
        )
        if ready_file is not None:
            ready = {"target": address, "port": server.port, "model": model.name}
            _write_ready(ready_file, json.dumps(ready))

    await server.serve(on_ready)


def _write_ready(path: Path, text: str) -> None:
    """In one move: whoever waits for the file must never read half of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"--ready-file: {path}: {error.strerror}") from error


@app.command()
def worker(
    coordinator: Annotated[str, typer.Option(help="HOST:PORT given to serve --control.")],
    rank: Annotated[int, typer.Option(min=0, envvar="RANK")] = 0,
    world_size: Annotated[int, typer.Option(min=1, envvar="WORLD_SIZE")] = 1,
    local_rank: Annotated[int, typer.Option(min=0, envvar="LOCAL_RANK")] = 0,
    local_world_size: Annotated[int, typer.Option(min=1, envvar="LOCAL_WORLD_SIZE")] = 1,
    rendezvous: Annotated[
        str, typer.Option(help="Where ranks meet; env:// is torchrun's.")
    ] = "env://",
    join_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds to wait for the coordinator to be there.")
    ] = 300.0,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, ...")] = "INFO",
) -> None:
    """Run one rank: torchrun --nproc-per-node 8 ... -m csps worker --coordinator HOST:PORT."""
    _start_logging(log_level)
    faulthandler.enable()
    # torch takes seconds to import, and of all roles this one alone needs it.
    build = importlib.import_module("csps.worker.build")
    service = importlib.import_module("csps.worker.service")
    place = build.Place(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        rendezvous=rendezvous,
    )
    status = 1
    try:
        service.Worker(coordinator, place, join_timeout_s=join_timeout).run()
        status = 0
    except CspsError as error:
        _print_error(error)
    except Exception:
        logger.exception("rank %d failed", rank)
    # At once: a thread may be inside a transfer with a rank that is gone, and the interpreter
    # would wait for it.
    logging.shutdown()
    os._exit(status)


@app.command()
def submit(
    target: Annotated[str, typer.Option(help="HOST:PORT of the server.")] = "127.0.0.1:50051",
    file: Annotated[
        Path | None, typer.Option(help="Document to put before the prompt; - reads standard input.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="The question, or the whole prompt.")] = "",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    raw: Annotated[
        bool, typer.Option("--raw", help="Send plain text, without the chat template.")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(help="Output tokens at most; default: the context's rest.")
    ] = 512,
    min_tokens: Annotated[int, typer.Option(help="No stop token before so many.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus, in (0, 1].")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest; 0: off.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the output; repeatable.")] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after end-of-sequence.")
    ] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="Log-probabilities, with so many alternatives.")
    ] = None,
    attention: Annotated[
        AttentionKind | None,
        typer.Option(help="How the prompt is prefilled; default: the server's choice."),
    ] = None,
    gamma: Annotated[
        float | None, typer.Option(help="Share of attention mass csa keeps, in (0, 1].")
    ] = None,
    window: Annotated[int | None, typer.Option(help="KV blocks csa-distance keeps whole.")] = None,
    report_heads: Annotated[
        bool, typer.Option("--report-heads", help="With --json: recall by layer and KV head.")
    ] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds before giving up.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write text, tokens and timings here.")
    ] = None,
) -> None:
    """Send a prompt and stream the answer.

    csps submit --file report.txt --prompt "What changed in March?"

    git log -p | csps submit --file - --prompt "Summarize these changes."

    csps submit --raw --prompt "Once upon a time" --temperature 0.8 --json story.json

    Without --file and --prompt, standard input is the prompt. The answer goes to standard
    output, progress and timings to standard error. Ctrl-C ends the request on the server.
    """
    stdin = None if sys.stdin.isatty() else sys.stdin.buffer
    submission = Submission(
        target=target,
        prompt=read_prompt(file, prompt, stdin),
        sampling=SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=tuple(stop or ()),
            ignore_eos=ignore_eos,
            seed=seed,
            logprobs=logprobs,
        ),
        attention=AttentionChoice(attention, gamma, window, report_heads),
        raw=raw,
        system=system,
        timeout_s=timeout,
        json_path=json_file,
    )
    asyncio.run(run_submission(submission, console))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _start_logging(level: str) -> None:
    if level.upper() not in logging.getLevelNamesMapping():
        raise ConfigError(f"--log-level: expected DEBUG, INFO, WARNING or ERROR, got {level!r}")
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="[%X]"))
    else:  # a file or a collector: one line a record, whatever its length
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _print_error(error: CspsError) -> None:
    console.print("[bold red]error[/]:", Text(str(error)), soft_wrap=True)


def main() -> None:
    """Entry point: errors meant for the user are one line and status 1, not a traceback."""
    try:
        app()
    except CspsError as error:
        _print_error(error)
        sys.exit(1)
    except BrokenPipeError:
        # Whoever read our output has gone: say nothing more, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
