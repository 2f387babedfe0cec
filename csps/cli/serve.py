"""`csps serve`: flags -> ServerConfig -> one coordinator."""

import asyncio
from typing import Annotated

import typer

from csps.checkpoint.locate import DEFAULT_MODEL
from csps.cli import device_options as device
from csps.cli import network_options as network
from csps.cli import observe_options as observe
from csps.cli import schedule_options as schedule
from csps.cli import sparse_options as sparse
from csps.cli.api_keys import read_keys
from csps.cli.serve_flags import (
    parse_attention,
    parse_control_address,
    parse_num_ranks,
    parse_on_off,
    parse_ranks,
    parse_share,
    parse_tbt_target,
    parse_tp,
    step_tokens,
)
from csps.cli.serve_run import run_server
from csps.cli.terminal import start_logging
from csps.cli.tls import TlsCert, TlsKey, read_server_tls
from csps.core.attention import AttentionParams, CsaConfig
from csps.core.config import (
    STAGE_TOKENS,
    AttentionBackend,
    DType,
    ServerConfig,
    WorkerSetup,
)
from csps.core.errors import ConfigError
from csps.core.strategy import STRATEGIES, Strategy, lane_layouts
from csps.units import parse_bytes

SHAPE = "Model and ranks"
ATTENTION, CSA = AttentionParams(), CsaConfig()  # their defaults are the flags'


def serve(
    model: Annotated[
        str,
        typer.Option(
            help="Hugging Face directory, GGUF file, or the default model's name.",
            rich_help_panel=SHAPE,
        ),
    ] = DEFAULT_MODEL,
    strategy: Annotated[
        Strategy,
        typer.Option(
            help="csps: each prompt over all ranks, sparse; decode beside it. ring: the same, "
            "exact. sarathi: tensor parallel, chunked prefill in the steps of decode. shift: as "
            "sarathi, but large steps are sequence parallel.",
            rich_help_panel=SHAPE,
        ),
    ] = Strategy.CSPS,
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
            min=0,
            help="Ranks each weight is split over; the rest of the ranks split the tokens. 0: 1, "
            "with --strategy sarathi all.",
            rich_help_panel=SHAPE,
        ),
    ] = 0,
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
    gpu_memory_utilization: device.GpuMemoryUtilization = 0.9,
    attention_backend: device.Backend = AttentionBackend.AUTO,
    cuda_graphs: device.CudaGraphs = True,
    warm_up: device.WarmUp = None,
    block_size: Annotated[
        int, typer.Option(min=1, help="Tokens of a KV block.", rich_help_panel=SHAPE)
    ] = 64,
    long_tokens: schedule.LongTokens = 512,
    stage_tokens: schedule.StageTokens = 0,
    token_budget: schedule.TokenBudget = 512,
    layout: schedule.FixedLayout = None,
    shift_threshold: schedule.ShiftThreshold = 0,
    probe_every: schedule.ProbeEvery = 0,
    tbt_target: schedule.TbtTarget = 0.0,
    ageing: schedule.Ageing = 0.5,
    prefill_ranks: schedule.PrefillRanks = "",
    decode_ranks: schedule.DecodeRanks = "",
    prefix_cache: schedule.PrefixCache = True,
    async_scheduling: schedule.AsyncScheduling = True,
    max_running: schedule.MaxRunning = 64,
    max_waiting_tokens: schedule.MaxWaitingTokens = 1_000_000,
    attention: sparse.Attention = None,
    csa_gamma: sparse.Gamma = ATTENTION.gamma,
    csa_min_recall: sparse.MinRecall = CSA.min_recall,
    csa_min_recall_p5: sparse.MinRecallP5 = CSA.min_recall_p5,
    csa_max_density: sparse.MaxDensity = CSA.max_density,
    csa_min_tokens: sparse.MinTokens = 2048,
    csa_rows: sparse.Rows = CSA.rows_per_tile,
    csa_estimate: sparse.ByEstimate = CSA.estimate,
    csa_window: sparse.Window = ATTENTION.window_blocks,
    csa_wire: sparse.OnWire = CSA.wire,
    pipeline: sparse.Pipeline = "on",
    host: network.Host = "127.0.0.1",
    port: network.Port = 50051,
    http_port: network.HttpPort = None,
    api_key_file: network.ApiKeyFile = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    control: network.Control = "127.0.0.1:0",
    collective_timeout: network.CollectiveTimeout = 300.0,
    ready_file: network.ReadyFile = None,
    step_log: observe.StepLog = None,
    metrics_port: observe.MetricsPort = None,
    otlp_endpoint: observe.OtlpEndpoint = "",
    log_level: network.LogLevel = "INFO",
) -> None:
    """Serve a model over gRPC, and to OpenAI's clients with --http-port.

    On one machine: csps serve --workers 2. On a cluster: csps serve --workers 0 --ranks 8
    --control 0.0.0.0:9200 here, and on every machine
    torchrun ... -m csps worker --coordinator HERE:9200.
    """
    start_logging(log_level)
    num_ranks = parse_num_ranks(workers, ranks)
    control_host, control_port = parse_control_address(control)
    if ready_file is not None and not ready_file.absolute().parent.is_dir():
        raise ConfigError(f"--ready-file: {ready_file}: no such directory")
    tp = parse_tp(strategy, tp, num_ranks)
    csa = CsaConfig(
        min_recall=csa_min_recall,
        min_recall_p5=csa_min_recall_p5,
        max_density=csa_max_density,
        rows_per_tile=csa_rows,
        estimate=csa_estimate,
        wire=csa_wire,
        pipeline=parse_on_off("--pipeline", pipeline),
    )
    csa.validate()
    placement = STRATEGIES[strategy].placement
    decode_lane = placement.lanes[-1]
    config = ServerConfig(
        setup=WorkerSetup(
            model=model,
            dtype=dtype,
            block_size=block_size,
            kv_memory_bytes=0 if kv_memory == "auto" else parse_bytes("--kv-memory", kv_memory),
            gpu_memory_utilization=parse_share("--gpu-memory-utilization", gpu_memory_utilization),
            step_tokens=step_tokens(
                strategy,
                stage_tokens=stage_tokens or max(STAGE_TOKENS.values()),
                long_tokens=long_tokens,
                token_budget=token_budget,
                max_running=max_running,
            ),
            step_sequences=max_running,
            attention_backend=attention_backend,
            cuda_graphs=cuda_graphs,
            async_scheduling=async_scheduling,
            decode_layouts=lane_layouts(strategy, decode_lane, layout),
            max_model_len=max_model_len,
            tp=tp,
            placement=placement,
            threads_per_rank=threads_per_rank,
            collective_timeout_s=collective_timeout,
            csa=csa,
            rope_scaling=rope_scaling,
        ),
        strategy=strategy,
        num_ranks=num_ranks,
        long_tokens=long_tokens,
        stage_tokens=stage_tokens,
        token_budget=token_budget,
        layout=layout,
        shift_threshold=shift_threshold,
        probe_every=probe_every,
        tbt_target_ms=parse_tbt_target(tbt_target),
        ageing=ageing,
        prefill_ranks=parse_ranks("--prefill-ranks", prefill_ranks, num_ranks // tp),
        decode_ranks=parse_ranks("--decode-ranks", decode_ranks, num_ranks // tp),
        prefix_cache=prefix_cache,
        attention=parse_attention(strategy, attention, csa_gamma, csa_window),
        csa_min_tokens=csa_min_tokens,
        max_running=max_running,
        max_waiting_tokens=max_waiting_tokens,
        host=host,
        port=port,
        http_port=http_port,
        api_keys=() if api_key_file is None else read_keys(api_key_file),
        tls=read_server_tls(tls_cert, tls_key),
        control_host=control_host,
        control_port=control_port,
        warm_up=warm_up,
        step_log=step_log,
        metrics_port=metrics_port,
        otlp_endpoint=otlp_endpoint,
    )
    asyncio.run(run_server(config, start_workers=workers > 0, ready_file=ready_file))
