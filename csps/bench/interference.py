"""`bench interference`: does a stream keep its tokens coming while a long prompt prefills?"""

import asyncio
import time
from collections.abc import Sequence
from itertools import pairwise

from csps.bench.measure import Measured, ServerFlags, follow, request
from csps.bench.server import ServerProcess
from csps.core.errors import ConfigError
from csps.percentiles import gaps_ms, percentile
from csps.rpc.client import GenerationClient

WARMUP_TOKENS = 20


async def interference(
    flags: ServerFlags, context: list[int], prompt: list[int], quiet_tokens: int, output: int
) -> dict[str, object]:
    """TBT of one stream: quiet, then while `prompt` prefills.

    ConfigError if the stream's `output` tokens end before the prompt's prefill does.
    """
    with ServerProcess(*flags.arguments()) as server:
        async with GenerationClient(server.target) as client:
            await request(client, prompt[:64], 2)
            stream = Measured(time.monotonic())
            task = asyncio.create_task(follow(client, context, output, stream))
            await _wait_for(stream, task, WARMUP_TOKENS + quiet_tokens)
            quiet = gaps_ms(stream.arrivals[WARMUP_TOKENS:])
            begun = time.monotonic()
            long = await request(client, prompt, 1)
            ended = long.arrivals[0]
            # One token more closes the last gap, however long the prefill made it.
            while stream.arrivals[-1] < ended:
                await _wait_for(stream, task, len(stream.arrivals) + 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    busy = overlapping_gaps_ms(stream.arrivals, begun, ended)
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


async def _wait_for(stream: Measured, task: "asyncio.Task[None]", num_tokens: int) -> None:
    while len(stream.arrivals) < num_tokens:
        if task.done():
            task.result()
            raise ConfigError(
                f"--output: the stream ended after {len(stream.arrivals)} tokens, before the "
                "measurement did; give it more"
            )
        await asyncio.sleep(0.02)


def overlapping_gaps_ms(arrivals: Sequence[float], begun: float, ended: float) -> list[float]:
    """Gaps that overlap [begun, ended], seconds in, ms out.

    Also those that reach beyond it: a stream that stalls all the while has but one gap, and
    that one is what was to be found.
    """
    return [
        1e3 * (later - earlier)
        for earlier, later in pairwise(arrivals)
        if later > begun and earlier < ended
    ]


def _summary(gaps: list[float]) -> dict[str, float]:
    return {
        "tokens": len(gaps),
        "tbt_ms_p50": percentile(gaps, 0.5),
        "tbt_ms_p99": percentile(gaps, 0.99),
        "tbt_ms_max": max(gaps, default=0.0),
    }
