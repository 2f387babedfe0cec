"""`csps replay`: a trace to a live server, and the folder of what came back."""

import asyncio
import time
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from csps.checkpoint.locate import locate
from csps.checkpoint.tokenizer import load_tokenizer
from csps.core.errors import ConfigError
from csps.core.request import SamplingParams
from csps.records.provenance import provenance
from csps.records.rows import REQUESTS_FILE, STEPS_FILE
from csps.records.run import RUN_FILE, RunInfo, RunKind, write_run
from csps.records.sink import Sink
from csps.records.summary import write_summary
from csps.replay.play import Player, too_long
from csps.replay.progress import show, status_line
from csps.replay.prompts import PromptMaker
from csps.replay.steps import record_steps
from csps.rpc.client import SERVERS_CHOICE, AttentionChoice, GenerationClient
from csps.rpc.tls import ClientTls
from csps.trace.schema import Trace, TraceRequest
from csps.v1 import generation_pb2 as pb

WARM_UP_TOKENS = 64
WARM_UP_OUTPUT = 4
LAST_STEPS_S = 0.5  # until the records of the last steps have come


@dataclass(frozen=True, slots=True)
class ReplayConfig:
    """What to play where. `text`: prompts are pieces of it, tokenized as `model` does.

    `drain_s`: wait so long for what has not ended when the last is sent; None: for its end.
    """

    target: str
    out: Path
    api_key: str = field(default="", repr=False)
    tls: ClientTls | None = None
    speed: float = 1.0
    seed: int = 0
    drain_s: float | None = None
    text: Path | None = None
    model: str = ""
    attention: AttentionChoice = SERVERS_CHOICE
    slo_ttft_s: float | None = None
    slo_tbt_ms: float | None = None
    name: str | None = None  # of the run; default: the strategy and the trace
    skip_bad: bool = False  # leave out what does not fit the model's context


def prepare_folder(out: Path) -> None:
    """ConfigError unless `out` can hold a new run: an earlier one is never overwritten."""
    if (out / RUN_FILE).exists():
        raise ConfigError(f"--out: {out} holds a run already: remove it or choose another")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {out}: {error.strerror}") from None


def fitting(trace: Trace, max_model_len: int, skip: bool) -> tuple[TraceRequest, ...]:
    """The requests that fit the model's context; ConfigError if some do not, unless `skip`."""
    long = dict(too_long(trace.requests, max_model_len))
    if long and not skip:
        index, num_tokens = next(iter(long.items()))
        raise ConfigError(
            f"{len(long)} of {len(trace.requests)} requests are longer than the model's context "
            f"of {max_model_len} tokens (request {index}: {num_tokens} with its output): make "
            "them shorter with csps trace scale, or leave them out with --skip-bad"
        )
    kept = tuple(request for i, request in enumerate(trace.requests) if i not in long)
    if not kept:
        raise ConfigError(f"no request fits the model's context of {max_model_len} tokens")
    return kept


async def replay(
    trace: Trace, config: ReplayConfig, console: Console, skipped_rows: int = 0
) -> dict[str, Any]:
    """Play `trace`, write the run's folder, return its summary.

    When this is cancelled the folder holds what there was until then. ServerError if the server
    does not answer before the first request; what fails later is in the rows. ConfigError as
    above.
    """
    prepare_folder(config.out)
    async with GenerationClient(config.target, config.api_key, config.tls) as client:
        model, server = await client.model_info(), await client.server_info()
        requests = fitting(trace, model.max_model_len, config.skip_bad)
        text_ids = _text_ids(config, trace.block_tokens, model.vocab_size)
        maker = PromptMaker(trace.block_tokens, model.vocab_size, config.seed, text_ids)
        await _warm_up(client, model.vocab_size, config.seed)
        run = replace(
            _run_info(trace, config, model, server),
            num_requests=len(requests),
            skipped_rows=skipped_rows + len(trace.requests) - len(requests),
        )
        begun = time.time()
        try:
            with Sink(config.out / REQUESTS_FILE) as rows, Sink(config.out / STEPS_FILE) as steps:
                player = Player(client, requests, maker.prompt, rows.add, config.speed)
                player.attention = config.attention
                player.run_id = f"replay-{uuid.uuid4().hex[:8]}"
                await _play(player, config.drain_s, client, steps, console)
            run = replace(run, interrupted=False)
        finally:
            write_run(config.out, replace(run, elapsed_s=time.time() - begun))
            summary = write_summary(config.out)
    return summary


async def _play(
    player: Player, drain_s: float | None, client: GenerationClient, steps: Sink, console: Console
) -> None:
    """Play to the end, beside it show how far it is and record the server's steps."""
    ready = asyncio.Event()
    beside = [asyncio.create_task(record_steps(client, steps.add, time.time(), ready, console))]
    try:
        await ready.wait()
        beside.append(asyncio.create_task(show(player, console, time.monotonic)))
        await player.run(drain_s)
        await asyncio.sleep(LAST_STEPS_S)
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        console.print(status_line(player, time.monotonic()), highlight=False, soft_wrap=True)


async def _warm_up(client: GenerationClient, vocab_size: int, seed: int) -> None:
    """One short request that is not in the trace: the first pays for what is made lazily."""
    random = np.random.default_rng((seed, WARM_UP_TOKENS))
    token_ids = random.integers(vocab_size, size=WARM_UP_TOKENS).tolist()
    sampling = SamplingParams(max_tokens=WARM_UP_OUTPUT, ignore_eos=True)
    async for _ in client.generate(token_ids, sampling):
        pass


def _text_ids(config: ReplayConfig, block_tokens: int, vocab_size: int) -> list[int] | None:
    if config.text is None:
        return None
    try:
        text = config.text.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"--text: {config.text}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text: {config.text}: not UTF-8 at byte {error.start}") from None
    token_ids = load_tokenizer(locate(config.model)).encode(text, add_special_tokens=False)
    if len(token_ids) < block_tokens:
        raise ConfigError(f"--text: {config.text} has {len(token_ids)} tokens, fewer than a block")
    if max(token_ids) >= vocab_size:
        raise ConfigError(
            f"--model: {config.model} has tokens that the server's model does not know: name the "
            "model that the server runs"
        )
    return token_ids


def _run_info(
    trace: Trace,
    config: ReplayConfig,
    model: pb.GetModelInfoResponse,
    server: pb.GetServerInfoResponse,
) -> RunInfo:
    """What is known before the run; it counts as interrupted until it is not."""
    return RunInfo(
        name=config.name or f"{server.strategy} {trace.name}",
        kind=RunKind.LIVE,
        strategy=server.strategy,
        model=model.model,
        ranks=server.sp * server.tp,
        trace=trace.name,
        trace_source=trace.source,
        num_requests=len(trace.requests),
        speed=config.speed,
        elapsed_s=0.0,
        block_size=server.block_size,
        pages_per_rank=server.blocks_per_rank,
        settings={
            "sp": server.sp,
            "tp": server.tp,
            "dtype": model.dtype,
            "attention": config.attention.kind or server.attention,
            "csa_gamma": server.csa_gamma,
            "csa_min_tokens": server.csa_min_tokens,
            "token_budget": server.token_budget,
            "stage_tokens": server.stage_tokens,
            "long_tokens": server.long_tokens,
            "max_running": server.max_running,
            "prefix_cache": server.HasField("prefix_cache"),
            "layout": server.layout or None,
            "shift_threshold": server.shift_threshold,
            "tbt_target_ms": server.tbt_target_ms,
            "prompts": "random tokens" if config.text is None else f"pieces of {config.text.name}",
            "seed": config.seed,
            "csps": server.version,
        },
        slo_ttft_s=config.slo_ttft_s,
        slo_tbt_ms=config.slo_tbt_ms,
        interrupted=True,
        **provenance(),
    )
