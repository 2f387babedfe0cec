"""`bench prefill` and `bench decode`: one kind of step at a time, on an otherwise idle server."""

import asyncio
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil

from csps.bench.measure import ServerFlags, lane_delta, request
from csps.bench.server import ServerProcess
from csps.checkpoint.config import read_config
from csps.checkpoint.locate import locate
from csps.core.attention import AttentionKind
from csps.percentiles import percentile
from csps.rpc.client import AttentionChoice, GenerationClient

Result = dict[str, object]


async def prefill(
    flags: ServerFlags, texts: list[list[int]], kinds: list[AttentionKind], repeat: int
) -> list[Result]:
    """TTFT and the prefill lane's counters for each text and way to attend.

    A text has one token more than the prompt for each run: prompts must not begin alike.
    """
    results: list[Result] = []
    num_runs = repeat * len(kinds)
    with ServerProcess(*flags.arguments()) as server:
        ranks = psutil.Process(server.pid).children()
        async with GenerationClient(server.target) as client:
            await request(client, texts[0][:64], 1)
            for text in texts:
                runs: dict[AttentionKind, list[Result]] = {kind: [] for kind in kinds}
                for index in range(num_runs):
                    kind = kinds[index % len(kinds)]
                    prompt = text[index : len(text) - num_runs + index]
                    runs[kind].append(await _prefill_once(client, prompt, kind, ranks))
                results += _prefill_results(len(text) - num_runs, runs)
    return results


def _prefill_results(num_tokens: int, runs: dict[AttentionKind, list[Result]]) -> list[Result]:
    ttft_s = {kind: median(run["ttft_s"] for run in runs[kind]) for kind in runs}  # type: ignore[type-var]
    dense = ttft_s.get(AttentionKind.DENSE)
    return [
        {
            "tokens": num_tokens,
            "attention": kind.value,
            "ttft_s": ttft_s[kind],
            "over dense": ttft_s[kind] / dense if dense else None,  # type: ignore[operator]
            "prefill_tok_s": num_tokens / ttft_s[kind],  # type: ignore[operator]
            "runs": runs[kind],
        }
        for kind in runs
    ]


async def _prefill_once(
    client: GenerationClient, prompt: list[int], kind: AttentionKind, ranks: list[psutil.Process]
) -> Result:
    _forget_peaks(ranks)
    before = await client.server_info()
    measured = await request(client, prompt, 1, AttentionChoice(kind))
    delta = lane_delta(before, await client.server_info(), "prefill")
    complete = measured.complete
    assert complete is not None
    return {
        "ttft_s": complete.first_token_s,
        "client_ttft_s": measured.client_ttft_s,
        **delta,
        "peak_memory_mb": max(_peak_mb(rank) for rank in ranks),
        "sparse": asdict(complete.sparse) if complete.sparse else None,
    }


def _forget_peaks(ranks: list[psutil.Process]) -> None:
    for rank in ranks:
        # Linux, proc(5): peak resident memory starts anew.
        Path(f"/proc/{rank.pid}/clear_refs").write_text("5")


def _peak_mb(process: psutil.Process) -> float:
    """Peak of resident memory since it was last forgotten, MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


async def decode(
    flags: ServerFlags, contexts: list[list[int]], output: int, batch: int
) -> list[Result]:
    """TBT and bytes of `batch` equal streams at each context."""
    results = []
    with ServerProcess(*flags.arguments()) as server:
        async with GenerationClient(server.target) as client:
            await request(client, contexts[0][:64], 4)
            for context in contexts:
                results.append(await _decode_once(client, flags, context, output, batch))
    return results


async def _decode_once(
    client: GenerationClient, flags: ServerFlags, context: list[int], output: int, batch: int
) -> Result:
    before = await client.server_info()
    streams = await asyncio.gather(*(request(client, context, output) for _ in range(batch)))
    delta = lane_delta(before, await client.server_info(), "decode")
    # Gaps while every stream runs: the others' prefill is not decode.
    begun = max(stream.arrivals[0] for stream in streams)
    gaps = [
        1e3 * (later - earlier)
        for stream in streams
        for earlier, later in pairwise(stream.arrivals)
        if earlier >= begun
    ]
    formula = decode_bytes_per_token(flags)
    moved = delta["bytes_moved"] - delta["bytes_by_kind"].get("drawn", 0)  # type: ignore[operator, attr-defined]
    per_token = moved / max(delta["tokens"], 1)  # type: ignore[call-overload]
    return {
        "context": len(context),
        "batch": batch,
        "tbt_ms_p50": percentile(gaps, 0.5),
        "tbt_ms_p99": percentile(gaps, 0.99),
        "tok_s": 1e3 * batch / percentile(gaps, 0.5) if gaps else 0.0,
        "bytes_per_token": per_token,
        "bytes_formula": formula,
        "bytes_ratio": per_token / formula if formula else None,
        "gaps_ms": gaps,
        **delta,
    }


def decode_bytes_per_token(flags: ServerFlags) -> int:
    """Bytes one token moves when all P ranks hold KV of its sequence.

    Per layer each of P - 1 ranks gets q (Hq * D * e) and returns o of the same size with a
    log-sum-exp of 4 bytes per head: (P - 1) (2 q + 4 Hq).
    """
    config = read_config(locate(flags.model))
    element_bytes = 4 if flags.dtype == "float32" else 2
    query_bytes = config.num_heads * config.head_dim * element_bytes
    return config.num_layers * (flags.ranks - 1) * (2 * query_bytes + 4 * config.num_heads)
