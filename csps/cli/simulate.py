"""`csps simulate`: flags -> a run that no machine took part in."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csps.cli.serve_flags import parse_tbt_target
from csps.cli.simulate_run import at_capacity, play, show
from csps.cli.terminal import console
from csps.core.attention import AttentionKind
from csps.core.errors import ConfigError
from csps.core.plan import Layout
from csps.core.strategy import Strategy
from csps.records.run import RUN_FILE
from csps.records.summary import save
from csps.sim.cost_decode import DecodeMoves
from csps.sim.files import shipped
from csps.sim.model import WeightType
from csps.trace.schema import bad_rows_text, read_trace

if TYPE_CHECKING:
    from csps.sim.config import SimConfig
    from csps.sim.run import SimResult

DEPLOYMENT, SCHEDULE = "Deployment", "Scheduling"
STUDY, CAPACITY = "What csps is made of", "Capacity search"


def simulate(
    trace: Annotated[Path, typer.Argument(help="A trace in CSPS's schema (csps trace --help).")],
    cluster: Annotated[
        str,
        typer.Option(
            help=f"Machines: {', '.join(shipped('clusters'))}, or a file (docs/simulator.md)."
        ),
    ],
    model: Annotated[str, typer.Option(help=f"Shape: {', '.join(shipped('models'))}, or a file.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the run's records; must not hold a run.")
    ] = None,
    strategy: Annotated[
        Strategy, typer.Option(help="As of csps serve.", rich_help_panel=DEPLOYMENT)
    ] = Strategy.CSPS,
    replicas: Annotated[
        int,
        typer.Option(
            min=1, help="Servers that share the GPUs and the requests.", rich_help_panel=DEPLOYMENT
        ),
    ] = 1,
    sp: Annotated[
        int,
        typer.Option(
            min=0,
            help="Ranks of a server that split tokens; 0: the rest.",
            rich_help_panel=DEPLOYMENT,
        ),
    ] = 0,
    tp: Annotated[
        int,
        typer.Option(
            min=0,
            help="Ranks that split weights; 0: as few as leave half of the memory for KV, with "
            "sarathi all.",
            rich_help_panel=DEPLOYMENT,
        ),
    ] = 0,
    weights: Annotated[
        WeightType, typer.Option(help="Type of the weights.", rich_help_panel=DEPLOYMENT)
    ] = WeightType.BFLOAT16,
    block_size: Annotated[
        int,
        typer.Option(
            min=0, help="Tokens of a KV block; 0: 64, or as measured.", rich_help_panel=DEPLOYMENT
        ),
    ] = 0,
    kv_pages: Annotated[
        int,
        typer.Option(
            min=0, help="KV blocks of a rank; 0: what memory leaves.", rich_help_panel=DEPLOYMENT
        ),
    ] = 0,
    token_budget: Annotated[
        int,
        typer.Option(min=1, help="sarathi, shift: new tokens of a step.", rich_help_panel=SCHEDULE),
    ] = 512,
    stage_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="csps, ring: new tokens of a prefill step; 0: 1,024 per rank that splits tokens.",
            rich_help_panel=SCHEDULE,
        ),
    ] = 0,
    long_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="csps, ring: prompts at least this long are split; 0: two blocks per rank.",
            rich_help_panel=SCHEDULE,
        ),
    ] = 0,
    max_running: Annotated[
        int,
        typer.Option(
            min=0,
            help="Requests of a server that hold KV at a time; 0: 256, on a calibrated cluster 64.",
            rich_help_panel=SCHEDULE,
        ),
    ] = 0,
    layout: Annotated[
        Layout | None,
        typer.Option(help="As of csps serve; default: by cost.", rich_help_panel=SCHEDULE),
    ] = None,
    shift_threshold: Annotated[
        int,
        typer.Option(min=0, help="As of csps serve; 0: by cost.", rich_help_panel=SCHEDULE),
    ] = 0,
    tbt_target: Annotated[
        float,
        typer.Option(help="As of csps serve (milliseconds).", rich_help_panel=SCHEDULE),
    ] = 0.0,
    prefix_cache: Annotated[
        bool,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Begin behind what is cached.",
            rich_help_panel=SCHEDULE,
        ),
    ] = True,
    attention: Annotated[
        AttentionKind | None,
        typer.Option(help="dense or csa; default: the strategy's.", rich_help_panel=STUDY),
    ] = None,
    csa_gamma: Annotated[
        float,
        typer.Option(help="As of csps serve; its density must be measured.", rich_help_panel=STUDY),
    ] = 0.95,
    csa_min_tokens: Annotated[
        int,
        typer.Option(min=0, help="Shorter prompts are dense.", rich_help_panel=STUDY),
    ] = 2048,
    pipeline: Annotated[
        bool,
        typer.Option(
            "--pipeline/--no-pipeline",
            help="Exchanges of prefill beside its computing.",
            rich_help_panel=STUDY,
        ),
    ] = True,
    separate_decode: Annotated[
        bool,
        typer.Option(
            "--separate-decode/--no-separate-decode",
            help="Decode steps beside prefill steps, or in turn with them.",
            rich_help_panel=STUDY,
        ),
    ] = True,
    decode_moves: Annotated[
        DecodeMoves,
        typer.Option(help="In decode, queries travel to KV, or KV to them.", rich_help_panel=STUDY),
    ] = DecodeMoves.QUERIES,
    speed: Annotated[
        float, typer.Option(min=1e-6, help="Play so many times as fast as the trace's clock.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of ties between replicas.")] = 0,
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
            help="Search the speed at which the --slo-... are just met, and simulate that.",
            rich_help_panel=CAPACITY,
        ),
    ] = False,
    tolerance: Annotated[
        float,
        typer.Option(min=0.001, help="Of the capacity, relative.", rich_help_panel=CAPACITY),
    ] = 0.05,
    name: Annotated[
        str | None, typer.Option(help="Of the run in comparisons; default: strategy and trace.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out bad rows of the trace.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the summary here besides.")
    ] = None,
) -> None:
    """Play a trace to servers on a cluster you do not have; every figure is simulated.

    csps simulate chat.jsonl --cluster a100x32 --model llama-3.1-70b --out runs/csps

    csps simulate chat.jsonl --cluster a100x32 --model llama-3.1-70b --strategy sarathi --replicas 4 --out runs/sarathi

    csps simulate chat.jsonl --cluster a100x8 --model llama-3.1-8b --find-capacity --slo-tbt 100

    The schedulers are those of csps serve, on a virtual clock; steps are timed by a model of the
    cluster (docs/simulator.md). The same flags give the same files, byte for byte. Ctrl-C ends
    the run and writes what there is.
    """  # noqa: E501
    if out is not None and (out / RUN_FILE).exists():
        raise ConfigError(f"--out: {out} holds a run already: remove it or choose another")
    run, clusters, models, configs = (
        importlib.import_module(f"csps.sim.{module}")
        for module in ("run", "cluster", "model", "config")
    )
    loaded, bad = read_trace(trace, skip_bad)
    if bad:
        console.print(f"{len(bad)} bad rows are left out:", highlight=False)
        console.print(bad_rows_text(trace, bad), highlight=False, soft_wrap=True)
    config = configs.SimConfig(
        strategy=strategy,
        sp=sp,
        tp=tp,
        replicas=replicas,
        block_size=block_size,
        token_budget=token_budget,
        stage_tokens=stage_tokens,
        long_tokens=long_tokens,
        max_running=max_running,
        kv_pages=kv_pages,
        prefix_cache=prefix_cache,
        layout=layout,
        shift_threshold=shift_threshold,
        tbt_target_ms=parse_tbt_target(tbt_target),
        attention=attention,
        csa_gamma=csa_gamma,
        csa_min_tokens=csa_min_tokens,
        pipeline=pipeline,
        separate_decode=separate_decode,
        decode_moves=decode_moves,
        speed=speed,
        seed=seed,
        slo_ttft_s=slo_ttft,
        slo_tbt_ms=slo_tbt,
        name=name,
    )
    machines, shape = clusters.load_cluster(cluster), models.load_model(model, weights)

    def simulated(changed: "SimConfig", title: str) -> "SimResult":
        return play(run, loaded, machines, shape, changed, title)

    found: dict[str, Any] = {}
    if capacity:
        config, found = at_capacity(simulated, config, loaded, tolerance)
    result = simulated(config, "simulated")
    result = replace(result, run=replace(result.run, skipped_rows=len(bad)))
    summary = {**(result.write(out) if out is not None else result.summary()), **found}
    if json_file is not None:
        save(json_file, summary)
    show(summary)
    if out is not None:
        console.print(f"records (simulated) are in {out}", highlight=False, soft_wrap=True)
