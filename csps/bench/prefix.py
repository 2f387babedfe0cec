"""`bench prefix`: a document that was asked about before, with a new question."""

from dataclasses import replace

from csps.bench.measure import Measured, ServerFlags, request
from csps.bench.server import ServerProcess
from csps.percentiles import percentile
from csps.rpc.client import GenerationClient

WARMUP_TOKENS = 64
FIXED_LAYOUT = ("--layout", "sp")  # nothing to measure at start


async def prefix(
    flags: ServerFlags,
    strategies: list[str],
    documents: list[list[int]],
    questions: list[list[int]],
) -> list[dict[str, object]]:
    """By strategy: TTFT of each document with the first question, then with the second."""
    rows = []
    for strategy in strategies:
        extra = ("--strategy", strategy, *FIXED_LAYOUT, *flags.extra, "--prefix-cache")
        with ServerProcess(*replace(flags, extra=extra).arguments()) as server:
            async with GenerationClient(server.target) as client:
                await request(client, documents[0][-WARMUP_TOKENS:], 2)
                runs = [await _ask_twice(client, doc, questions) for doc in documents]
        cold = percentile([run["cold_ttft_s"] for run in runs], 0.5)
        warm = percentile([run["warm_ttft_s"] for run in runs], 0.5)
        rows.append(
            {
                "strategy": strategy,
                "cold_ttft_s": cold,
                "warm_ttft_s": warm,
                "warm/cold": warm / cold,
                "cached_tokens": runs[-1]["cached_tokens"],
                "runs": runs,
            }
        )
    return rows


async def _ask_twice(
    client: GenerationClient, document: list[int], questions: list[list[int]]
) -> dict[str, float]:
    cold, warm = [await request(client, document + question, 4) for question in questions]
    return {
        "cold_ttft_s": _ttft_s(cold),
        "warm_ttft_s": _ttft_s(warm),
        "cached_tokens": warm.complete.cached_tokens if warm.complete is not None else 0,
    }


def _ttft_s(measured: Measured) -> float:
    assert measured.complete is not None
    return measured.complete.first_token_s
