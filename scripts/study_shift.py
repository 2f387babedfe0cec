"""Simulate the table of Shift Parallelism (arXiv 2509.16495) and print it beside the paper's.

    python scripts/study_shift.py --out runs/shift --json sim_shift.json

Llama-70B in fp8 on 8 H200: data parallel (8 servers of one GPU), tensor parallel, sequence
parallel (Ulysses) and Shift. Latency: requests of 4,000 tokens in and 250 out, one at a time.
Throughput: as many as --requests at once; tokens in and out per second. Bursts: such requests
arrive in bursts of about 17 s at 9 a second, about 43 s apart, as in the Azure code trace of 2023;
the paper's own bursts are others. Everything is simulated; the cluster file was not fitted to the
table. --out keeps every simulation.
"""

import argparse
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from csps.core.errors import ConfigError
from csps.core.plan import Layout
from csps.core.strategy import Strategy
from csps.records.provenance import provenance
from csps.sim.cluster import load_cluster
from csps.sim.config import SimConfig
from csps.sim.model import WeightType, load_model
from csps.sim.study import Cases
from csps.trace.arrivals import ArrivalKind, Arrivals, arrival_times
from csps.trace.schema import Trace, TraceRequest

PROMPT_TOKENS, OUTPUT_TOKENS = 4000, 250
BLOCK_TOKENS = 500
ALONE = 4  # requests, one at a time
APART_S = 60.0
BURSTS = Arrivals(ArrivalKind.ON_OFF)
BURST_RATE = 9.0  # requests per second, within a burst
SEED = 0
BUDGET = 8192  # tokens a step: two prompts

PAPER = {  # TTFT and TPOT in ms, thousand tokens per second; median TTFT of its bursty trace in ms
    "DP": {"ttft_ms": 614, "tpot_ms": 22.5, "throughput_ktok_s": 45.9, "bursty_ttft_ms": 1355},
    "TP": {"ttft_ms": 159, "tpot_ms": 9.34, "throughput_ktok_s": 24.7, "bursty_ttft_ms": 3930},
    "SP": {"ttft_ms": 103, "tpot_ms": 32.5, "throughput_ktok_s": 37.2},
    "Shift": {"ttft_ms": 102, "tpot_ms": 10.1, "throughput_ktok_s": 37.4, "bursty_ttft_ms": 148},
}
CONFIGS = {
    "DP": SimConfig(Strategy.SARATHI, tp=1, replicas=8),
    "TP": SimConfig(Strategy.SARATHI, tp=8),
    "SP": SimConfig(Strategy.SHIFT, sp=8, tp=1, layout=Layout.SP),
    "Shift": SimConfig(Strategy.SHIFT, sp=8, tp=1),
}


def made(name: str, arrivals_s: list[float]) -> Trace:
    """A request for each arrival; prompts share nothing."""
    blocks = PROMPT_TOKENS // BLOCK_TOKENS
    requests = tuple(
        TraceRequest(
            arrival_s=arrival_s,
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=OUTPUT_TOKENS,
            blocks=tuple(range(blocks * index, blocks * (index + 1))),
            session=index,
        )
        for index, arrival_s in enumerate(arrivals_s)
    )
    return Trace(name, "made by scripts/study_shift.py", BLOCK_TOKENS, requests)


def traces(num_requests: int) -> dict[str, Trace]:
    mean_rate = BURST_RATE * BURSTS.on_s / (BURSTS.on_s + BURSTS.off_s)
    bursts = islice(arrival_times(BURSTS, mean_rate, Random(SEED)), num_requests)
    return {
        "alone": made("alone", [APART_S * index for index in range(ALONE)]),
        "at_once": made("at_once", [0.0] * num_requests),
        "bursty": made("bursty", [round(arrival_s, 6) for arrival_s in bursts]),
    }


def simulated(runs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The figures of one deployment, in the units of PAPER."""
    flood = runs["at_once"]
    tokens_s = flood["prefill_tok_s"] + flood["decode_tok_s"]
    return {
        "ttft_ms": round(1e3 * runs["alone"]["ttft_s"]["mean"], 1),
        "tpot_ms": round(runs["alone"]["tbt_ms"]["mean"], 2),
        "throughput_ktok_s": round(tokens_s / 1e3, 1),
        "bursty_ttft_ms": round(1e3 * runs["bursty"]["ttft_s"]["p50"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for every simulation")
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    parser.add_argument("--requests", type=int, default=600, help="at once, and in bursts")
    args = parser.parse_args()
    cases = Cases(args.out)
    cluster, model = load_cluster("h200x8"), load_model("llama-3.1-70b", WeightType.FP8)
    rows = {}
    try:
        for name, deployment in CONFIGS.items():
            config = replace(deployment, token_budget=BUDGET, keep_steps=False)
            runs = {
                load: cases.figures(trace, cluster, model, config)
                for load, trace in traces(args.requests).items()
            }
            found = simulated(runs)
            errors = {key: round(found[key] / claim - 1, 3) for key, claim in PAPER[name].items()}
            rows[name] = {"paper": PAPER[name], "simulated": found, "error": errors, "runs": runs}
            print(name, found, errors, flush=True)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    command = "python scripts/study_shift.py --out FOLDER --json FILE"
    setting = {"cluster": cluster.name, "model": model.name, "weights": model.weights.value,
               "token_budget": BUDGET, "requests": args.requests}  # fmt: skip
    record = {**provenance(), "command": command, "simulated": True, "setting": setting}
    args.json.write_text(json.dumps({**record, "deployments": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
