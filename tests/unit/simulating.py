"""What the simulator's tests share: small traces, and settings in which little happens."""

from collections.abc import Sequence
from typing import Any

from csps.core.plan import Layout
from csps.core.strategy import Strategy
from csps.sim.cluster import load_cluster
from csps.sim.config import SimConfig
from csps.sim.model import load_model
from csps.sim.run import SimResult, simulate
from csps.trace.schema import Trace, TraceRequest

CLUSTER = load_cluster("a100x8")
MODEL = load_model("smollm2-135m")
BLOCK_TOKENS = 32


def request(
    arrival_s: float, prompt_tokens: int, output_tokens: int, first_block: int, session: int = 0
) -> TraceRequest:
    """Its blocks are numbered from `first_block` on."""
    num_blocks = -(-prompt_tokens // BLOCK_TOKENS)
    blocks = tuple(range(first_block, first_block + num_blocks))
    return TraceRequest(arrival_s, prompt_tokens, output_tokens, blocks, session)


def trace(requests: Sequence[TraceRequest]) -> Trace:
    ordered = sorted(requests, key=lambda item: item.arrival_s)
    return Trace("test", "made by a test", BLOCK_TOKENS, tuple(ordered))


def settings(strategy: Strategy, **changes: Any) -> SimConfig:
    """Two ranks, small blocks; layouts given, so that no cost model is fitted."""
    values: dict[str, Any] = {"replicas": 4, "tp": 2 if strategy is Strategy.SARATHI else 1}
    values |= {"block_size": 16, "token_budget": 64, "stage_tokens": 256, "long_tokens": 64}
    values |= {"layout": Layout.TP, "csa_min_tokens": 128}
    return SimConfig(strategy=strategy, **(values | changes))


def run(requests: Sequence[TraceRequest], strategy: Strategy, **changes: Any) -> SimResult:
    return simulate(trace(requests), CLUSTER, MODEL, settings(strategy, **changes))
