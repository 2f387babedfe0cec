"""`bench interference`: does a stream keep its tokens coming while a long prompt prefills?"""

import asyncio
import time

from csps.bench.measure import Measured, ServerFlags, follow, request
from csps.bench.server import ServerProcess
from csps.percentiles import gaps_ms, percentile
from csps.rpc.client import GenerationClient

WARMUP_TOKENS = 20


async def interference(
    flags: ServerFlags, context: list[int], prompt: list[int], quiet_tokens: int, output: int
) -> dict[str, object]:
    """TBT of one stream: quiet, then while `prompt` prefills."""
    with ServerProcess(*flags.arguments()) as server:
        async with GenerationClient(server.target) as client:
            await request(client, prompt[:64], 2)
            stream = Measured(time.monotonic())
            task = asyncio.create_task(follow(client, context, output, stream))
            while len(stream.arrivals) < WARMUP_TOKENS + quiet_tokens:
                if task.done():
                    task.result()
                await asyncio.sleep(0.02)
            quiet = gaps_ms(stream.arrivals[WARMUP_TOKENS:])
            begun = time.monotonic()
            long = await request(client, prompt, 1)
            ended = long.arrivals[0]
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    busy = gaps_ms([at for at in stream.arrivals if begun <= at <= ended])
    assert long.complete is not None
    return {
        "context": len(context),
        "prompt_tokens": len(prompt),
        "ttft_s": long.complete.first_token_s,
        "quiet": _summary(quiet),
        "busy": _summary(busy),
        "p50_ratio": percentile(busy, 0.5) / percentile(quiet, 0.5),
        "p99_ratio": percentile(busy, 0.99) / percentile(quiet, 0.99),
        "quiet_gaps_ms": quiet,
        "busy_gaps_ms": busy,
    }


def _summary(gaps: list[float]) -> dict[str, float]:
    return {
        "tokens": len(gaps),
        "tbt_ms_p50": percentile(gaps, 0.5),
        "tbt_ms_p99": percentile(gaps, 0.99),
        "tbt_ms_max": max(gaps, default=0.0),
    }
