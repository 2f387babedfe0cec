"""Simulate what the CSPS paper claims against Sarathi-Serve, each in its best configuration.

    csps trace generate doc_qa --seed 1 --rate 1 --requests 240 --out doc_qa.jsonl
    python scripts/study_paper.py --trace doc_qa.jsonl --out runs/paper --json sim_paper.json

For each model and cluster: how many requests per second Sarathi-Serve gets done when all of them
come at once (its saturation); then loads from a part of that to multiples of it. Everything is
simulated. --out keeps every simulation, so a study that was stopped goes on where it was; the
first trace gets all loads and the ablation, further ones a few loads. docs/simulated-studies.md
has the results.

The best configuration, for each load anew, is the one with the least mean response time (all at
once: with the most requests done per second): of all ways to split the GPUs at the first step
size, then of the other step sizes for the best of those.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from csps.core.attention import AttentionKind
from csps.core.errors import ConfigError
from csps.core.plan import Layout
from csps.core.strategy import Strategy
from csps.records.provenance import provenance
from csps.sim.cluster import Cluster, load_cluster
from csps.sim.config import SimConfig
from csps.sim.cost_decode import DecodeMoves
from csps.sim.model import SimModel, load_model
from csps.sim.study import Cases
from csps.trace.formats import read_any
from csps.trace.schema import Trace
from csps.trace.stats import trace_stats

LOADS = (0.3, 0.7, 1.0, 1.5, 3.0)  # of Sarathi-Serve's saturation
FEW_LOADS = (0.7, 1.5)  # of further traces, the ablation, and runs without a prefix cache
AT_ONCE = 1e9  # a speed
BUDGETS = (1024, 512, 2048, 4096)  # tokens of a step
STAGES_PER_RANK = (1024, 4096)  # tokens of a prefill step per rank of the sequence axis
PAPER = {  # "up to", arXiv 2409.15104v1
    "ttft": 7.5,
    "tbt": 1.92,
    "response": 9.8,
    "prefill_throughput": 8.2,
    "decode_throughput": 5.2,
}
FCFS = 1e6  # as ageing: whoever waited longest goes first


class Split(NamedTuple):
    """How the GPUs of a cluster are used."""

    replicas: int
    sp: int
    tp: int

    def __str__(self) -> str:
        return f"{self.replicas} x sp{self.sp} tp{self.tp}"


class Study(NamedTuple):
    model: str
    cluster: str
    sarathi: tuple[Split, ...]
    csps: tuple[Split, ...]


STUDIES = (
    Study(
        "mistral-7b",
        "a100x8",
        (Split(8, 1, 1), Split(4, 1, 2), Split(2, 1, 4), Split(1, 1, 8)),
        (Split(1, 8, 1), Split(2, 4, 1)),
    ),
    Study(
        "llama-3.1-70b",
        "a100x32",
        (Split(8, 1, 4), Split(4, 1, 8)),
        (Split(1, 8, 4), Split(1, 4, 8)),
    ),
)


class Bench(NamedTuple):
    """One model on one cluster with one trace."""

    study: Study
    cases: Cases
    trace: Trace
    cluster: Cluster
    model: SimModel

    def run(self, config: SimConfig) -> dict[str, Any]:
        config = replace(config, keep_steps=False)
        figures = self.cases.figures(self.trace, self.cluster, self.model, config)
        print(
            f"{self.model.name} {self.trace.name} {config.strategy} {label(config)} "
            f"rate {figures['rate']:.3g}/s: response {figures['response_s']['mean']:.4g} s",
            flush=True,
        )
        return figures


class Best(NamedTuple):
    config: SimConfig
    figures: dict[str, Any]

    def row(self) -> dict[str, Any]:
        return {"configuration": label(self.config), **self.figures}


def label(config: SimConfig) -> str:
    tokens = config.stage_tokens or config.token_budget
    return f"{Split(config.replicas, config.sp, config.tp)}, {tokens} tokens a step"


def configs_of(study: Study, strategy: Strategy) -> list[list[SimConfig]]:
    """By split; in each, one per step size."""
    if strategy is Strategy.SARATHI:
        return [
            [SimConfig(strategy, *_axes(split), token_budget=budget) for budget in BUDGETS]
            for split in study.sarathi
        ]
    return [
        [SimConfig(strategy, *_axes(split), stage_tokens=n * split.sp) for n in STAGES_PER_RANK]
        for split in study.csps
    ]


def _axes(split: Split) -> tuple[int, int, int]:
    return split.sp, split.tp, split.replicas


def best(bench: Bench, strategy: Strategy, speed: float) -> Best:
    """By the rule above."""

    def tried(config: SimConfig) -> Best:
        config = replace(config, speed=speed)
        return Best(config, bench.run(config))

    score: Callable[[Best], float] = _slowness if speed < AT_ONCE else _idleness
    splits = configs_of(bench.study, strategy)
    first = [tried(sizes[0]) for sizes in splits]
    winner = min(range(len(first)), key=lambda i: score(first[i]))
    return min([first[winner], *map(tried, splits[winner][1:])], key=score)


def _slowness(found: Best) -> float:
    return float(found.figures["response_s"]["mean"])


def _idleness(found: Best) -> float:
    return -float(found.figures["done_req_s"])


def ratios(sarathi: dict[str, Any], csps: dict[str, Any]) -> dict[str, float]:
    """How many times better csps is, under the names of PAPER."""
    pairs = {
        "ttft": (sarathi["ttft_s"]["mean"], csps["ttft_s"]["mean"]),
        "ttft_p99": (sarathi["ttft_s"]["p99"], csps["ttft_s"]["p99"]),
        "tbt": (sarathi["tbt_ms"]["mean"], csps["tbt_ms"]["mean"]),
        "tbt_p99": (sarathi["tbt_ms"]["p99"], csps["tbt_ms"]["p99"]),
        "response": (sarathi["response_s"]["mean"], csps["response_s"]["mean"]),
        "response_p99": (sarathi["response_s"]["p99"], csps["response_s"]["p99"]),
        "prefill_throughput": (csps["prefill_tok_s"], sarathi["prefill_tok_s"]),
        "decode_throughput": (csps["decode_tok_s"], sarathi["decode_tok_s"]),
    }
    return {name: round(above / below, 3) for name, (above, below) in pairs.items()}


def beside(sarathi: Best, csps: Best) -> dict[str, Any]:
    found = ratios(sarathi.figures, csps.figures)
    return {"sarathi": sarathi.row(), "csps": csps.row(), "ratios": found}


def ablation(bench: Bench, csps: SimConfig) -> list[dict[str, Any]]:
    """From dense sequence parallelism to csps, one part after another; then one part less."""
    dense = replace(
        csps,
        attention=AttentionKind.DENSE,
        pipeline=False,
        separate_decode=False,
        decode_moves=DecodeMoves.KV,
        layout=Layout.SP,
    )
    parts: tuple[tuple[str, dict[str, Any]], ...] = (
        ("dense SP: lanes take turns, KV moves in decode, nothing overlaps", {}),
        ("+ CSA", {"attention": AttentionKind.CSA}),
        ("+ pipeline", {"pipeline": True}),
        ("+ separate decode", {"separate_decode": True}),
        ("+ queries travel, not KV", {"decode_moves": DecodeMoves.QUERIES}),
        ("+ layout of decode by cost (csps)", {"layout": None}),
        ("csps, but prompts in order of arrival", {"ageing": FCFS}),
        ("csps, but dense", {"ageing": csps.ageing, "attention": AttentionKind.DENSE}),
    )
    rows, config = [], dense
    for name, changed in parts:
        config = replace(config, **changed)
        rows.append({"name": name, **bench.run(config)})
    return rows


def without_cache(bench: Bench, sarathi: SimConfig, csps: SimConfig) -> dict[str, Any]:
    """The same configurations with no prefix cache on either side."""
    off = [replace(config, prefix_cache=False) for config in (sarathi, csps)]
    return beside(*(Best(config, bench.run(config)) for config in off))


def study_trace(bench: Bench, whole: bool) -> dict[str, Any]:
    """`whole`: all loads, ablation, and runs without a prefix cache."""
    stats = trace_stats(bench.trace)
    at_once = [best(bench, strategy, AT_ONCE) for strategy in (Strategy.SARATHI, Strategy.CSPS)]
    saturation = at_once[0].figures["done_req_s"]
    found: dict[str, Any] = {
        "model": bench.model.name,
        "cluster": bench.cluster.name,
        "trace": {
            "source": bench.trace.source,
            "requests": stats.requests,
            "prompt_mean": round(stats.prompt.mean),
            "output_mean": round(stats.output.mean),
            "prefix_hit": round(stats.prefix_hit, 3),
        },
        "saturation_req_s": saturation,
        "loads": [],
        "at_once": beside(*at_once),
    }
    if whole:
        found |= {"ablation": [], "no_prefix_cache": []}
    for load in LOADS if whole else FEW_LOADS:
        speed = round(load * saturation / stats.rate, 6)
        sarathi, csps = (best(bench, s, speed) for s in (Strategy.SARATHI, Strategy.CSPS))
        found["loads"].append({"load": load, **beside(sarathi, csps)})
        if whole and load in FEW_LOADS:
            found["ablation"].append({"load": load, "rows": ablation(bench, csps.config)})
            pair = without_cache(bench, sarathi.config, csps.config)
            found["no_prefix_cache"].append({"load": load, **pair})
    return found


def up_to(studies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The largest ratios over all loads; of throughput, all requests at once included."""
    found = {}
    for name, claim in PAPER.items():
        rows = [row for study in studies for row in study["loads"]]
        if name.endswith("throughput"):
            rows += [study["at_once"] for study in studies]
        found[name] = {"paper": claim, "simulated": max(row["ratios"][name] for row in rows)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, nargs="+", required=True, help="of any known format")
    parser.add_argument("--out", type=Path, required=True, help="folder for every simulation")
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    args = parser.parse_args()
    cases = Cases(args.out)
    try:
        traces = [read_any(path)[0] for path in args.trace]
        studies = [
            study_trace(
                Bench(study, cases, trace, load_cluster(study.cluster), load_model(study.model)),
                whole=trace is traces[0],
            )
            for trace in traces
            for study in STUDIES
        ]
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    files = " ".join(path.name for path in args.trace)
    command = f"python scripts/study_paper.py --trace {files} --out FOLDER --json FILE"
    record = {**provenance(), "command": command, "simulated": True, "up_to": up_to(studies)}
    args.json.write_text(json.dumps({**record, "studies": studies}, indent=1) + "\n")


if __name__ == "__main__":
    main()
