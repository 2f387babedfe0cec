"""`csps serve`: flags -> ServerConfig -> one coordinator."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from csps.checkpoint.locate import DEFAULT_MODEL
from csps.cli.terminal import console, start_logging
from csps.coordinator.frontend import ServedModel
from csps.coordinator.server import Server
from csps.core.attention import AttentionKind, AttentionParams, CsaConfig, Estimate, Wire
from csps.core.config import DType, ServerConfig, WorkerSetup
from csps.core.errors import ConfigError, InvalidRequestError
from csps.units import parse_bytes

SERVE = "Server"
SHAPE = "Model and ranks"
SCHEDULE = "Scheduling"
SPARSE = "Attention of prefill"
ATTENTION, CSA = AttentionParams(), CsaConfig()  # their defaults are the flags'

FLAG_OF_FIELD = {"attention.gamma": "--csa-gamma", "attention.window_blocks": "--csa-window"}


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
    rope_scaling: Annotated[
        str,
        typer.Option(
            help="Longer context for a model that has no scaling of its own: linear:F, dynamic:F "
            "or yarn:F, F times the model's.",
            rich_help_panel=SHAPE,
        ),
    ] = "",
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
    ] = ATTENTION.kind,
    csa_gamma: Annotated[
        float,
        typer.Option(help="Share of attention mass csa keeps; 1: all.", rich_help_panel=SPARSE),
    ] = ATTENTION.gamma,
    csa_min_recall: Annotated[
        float,
        typer.Option(
            help="A head whose measured recall may be lower widens gamma, then runs dense.",
            rich_help_panel=SPARSE,
        ),
    ] = CSA.min_recall,
    csa_min_recall_p5: Annotated[
        float,
        typer.Option(
            help="The same for the recall that 95% of a head's rows reach: rare sharp rows.",
            rich_help_panel=SPARSE,
        ),
    ] = CSA.min_recall_p5,
    csa_max_density: Annotated[
        float,
        typer.Option(
            help="A head that would keep a larger share of its blocks runs dense.",
            rich_help_panel=SPARSE,
        ),
    ] = CSA.max_density,
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
    ] = CSA.rows_per_tile,
    csa_estimate: Annotated[
        Estimate,
        typer.Option(
            help="What blocks are chosen by: sampled query rows, or mean keys.",
            rich_help_panel=SPARSE,
        ),
    ] = CSA.estimate,
    csa_window: Annotated[
        int,
        typer.Option(help="Blocks csa-distance keeps whole.", rich_help_panel=SPARSE),
    ] = ATTENTION.window_blocks,
    csa_wire: Annotated[
        Wire, typer.Option(help="Type of fetched keys and values.", rich_help_panel=SPARSE)
    ] = CSA.wire,
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
    start_logging(log_level)
    num_ranks = _num_ranks(workers, ranks, tp)
    control_host, control_port = _control_address(control)
    if ready_file is not None and not ready_file.absolute().parent.is_dir():
        raise ConfigError(f"--ready-file: {ready_file}: no such directory")
    csa = CsaConfig(
        min_recall=csa_min_recall,
        min_recall_p5=csa_min_recall_p5,
        max_density=csa_max_density,
        rows_per_tile=csa_rows,
        estimate=csa_estimate,
        wire=csa_wire,
        pipeline=_is_on("--pipeline", pipeline),
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
            rope_scaling=rope_scaling,
        ),
        num_ranks=num_ranks,
        long_tokens=long_tokens,
        stage_tokens=stage_tokens,
        attention=_attention(attention, csa_gamma, csa_window),
        csa_min_tokens=csa_min_tokens,
        max_running=max_running,
        max_waiting_tokens=max_waiting_tokens,
        host=host,
        port=port,
        control_host=control_host,
        control_port=control_port,
    )
    asyncio.run(_serve(config, start_workers=workers > 0, ready_file=ready_file))


def _num_ranks(workers: int, ranks: int, tp: int) -> int:
    if bool(workers) == bool(ranks):
        raise ConfigError("--workers, --ranks: give one of them (ranks started here, or joined)")
    num_ranks = workers or ranks
    if num_ranks % tp:
        raise ConfigError(f"--tp: {tp} does not divide the number of ranks, {num_ranks}")
    return num_ranks


def _control_address(control: str) -> tuple[str, int]:
    host, _, port = control.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--control: expected HOST:PORT, got {control!r}")
    return host, int(port)


def _attention(kind: AttentionKind, gamma: float, window_blocks: int) -> AttentionParams:
    params = AttentionParams(kind, gamma, window_blocks)
    try:
        params.validate()
    except InvalidRequestError as error:  # it names a request's field
        raise ConfigError(f"{FLAG_OF_FIELD[error.field]}: {error.problem}") from None
    return params


def _is_on(flag: str, value: str) -> bool:
    if value not in ("on", "off"):
        raise ConfigError(f"{flag}: expected on or off, got {value!r}")
    return value == "on"


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
