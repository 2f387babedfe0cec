"""`bench prefill` and `bench decode`: one kind of step at a time, on an otherwise idle server."""

import asyncio
from itertools import pairwise
from statistics import median

from csps.bench.measure import ServerFlags, lane_delta, request
from csps.bench.server import ServerProcess
from csps.checkpoint.config import read_config
from csps.checkpoint.locate import locate
from csps.percentiles import percentile
from csps.rpc.client import GenerationClient

Result = dict[str, object]


async def prefill(flags: ServerFlags, prompts: list[list[int]], repeat: int) -> list[Result]:
    """TTFT and the prefill lane's counters for each prompt."""
    results: list[Result] = []
    with ServerProcess(*flags.arguments()) as server:
        async with GenerationClient(server.target) as client:
            await request(client, prompts[0][:64], 1)
            for prompt in prompts:
                runs = [await _prefill_once(client, prompt) for _ in range(repeat)]
                best = median(run["ttft_s"] for run in runs)  # type: ignore[type-var]
                results.append(
                    {
                        "tokens": len(prompt),
                        "ttft_s": best,
                        "prefill_tok_s": len(prompt) / best,  # type: ignore[operator]
                        "runs": runs,
                    }
                )
    return results


async def _prefill_once(client: GenerationClient, prompt: list[int]) -> Result:
    before = await client.server_info()
    measured = await request(client, prompt, 1)
    delta = lane_delta(before, await client.server_info(), "prefill")
    assert measured.complete is not None
    return {
        "ttft_s": measured.complete.first_token_s,
        "client_ttft_s": measured.client_ttft_s,
        **delta,
    }


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
    per_token = delta["bytes_moved"] / max(delta["tokens"], 1)  # type: ignore[operator, call-overload]
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
