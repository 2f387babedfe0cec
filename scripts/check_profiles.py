"""Compare generated traces with the published ones that their profiles are fitted to.

    python scripts/check_profiles.py TRACE_DIR --json docs/results/trace_profiles.json

TRACE_DIR holds conversation_full.jsonl and synthetic_full.jsonl (Mooncake's, FAST'25) and
long_clients_compact.json (quantiles of ServeGen's clients). For each profile and seed: the
Kolmogorov-Smirnov distance of input and output lengths, and the prefix hit rate of an infinite
cache. A generated trace has as many requests as the published one, at the profile's rate.
"""

import argparse
import json
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from csps.records.provenance import provenance
from csps.trace.formats import read_any
from csps.trace.generate import generate
from csps.trace.profiles import ProfileName
from csps.trace.schema import Trace
from csps.trace.stats import trace_stats

SEEDS = (0, 1, 2)
CLIENT_REQUESTS = 20_000  # of a generated trace beside a quantile table
# doc_qa is fitted to those prompts of the synthetic trace that hold a document; the others, 40%,
# are short questions.
DOCUMENT_TOKENS = 4000


class Published(NamedTuple):
    """A trace, of which only longer prompts count; or the name of a client's quantile table."""

    file: str
    least_tokens: int = 1
    client: str | None = None


PUBLISHED = {
    ProfileName.CHAT_LONG: Published("conversation_full.jsonl"),
    ProfileName.DOC_QA: Published("synthetic_full.jsonl", DOCUMENT_TOKENS),
    ProfileName.API_HEAVY_TAIL: Published(
        "long_clients_compact.json", client="language/m-mid/chunk-91"
    ),
    ProfileName.REASON_LONG: Published(
        "long_clients_compact.json", client="reason/deepseek-r1/chunk-15"
    ),
}


def ks_distance(a: Sequence[int], b: Sequence[int]) -> float:
    """Largest difference of the two empirical distribution functions."""
    a, b = sorted(a), sorted(b)
    return max(
        abs(bisect_right(a, value) / len(a) - bisect_right(b, value) / len(b)) for value in {*a, *b}
    )


def ks_to_table(tokens: Sequence[int], shares: Sequence[float], values: Sequence[int]) -> float:
    """As above, at the points of a quantile table: one value may stand for several shares."""
    tokens = sorted(tokens)
    distances = []
    for share, value in zip(shares, values, strict=True):
        below, upto = bisect_left(tokens, value), bisect_right(tokens, value)
        distances.append(max(below / len(tokens) - share, share - upto / len(tokens), 0.0))
    return max(distances)


def documents(trace: Trace, least_tokens: int) -> Trace:
    kept = (r for r in trace.requests if r.prompt_tokens >= least_tokens)
    return replace(trace, requests=tuple(kept))


def beside_trace(name: ProfileName, folder: Path, published: Published) -> dict[str, Any]:
    whole, _ = read_any(folder / published.file)
    real = documents(whole, published.least_tokens)
    rows = []
    for seed in SEEDS:
        made = generate(name, seed, requests=len(real.requests))
        rows.append(
            {
                "seed": seed,
                "input_ks": ks_distance(
                    [r.prompt_tokens for r in real.requests],
                    [r.prompt_tokens for r in made.requests],
                ),
                "output_ks": ks_distance(
                    [r.output_tokens for r in real.requests],
                    [r.output_tokens for r in made.requests],
                ),
                **_summary(made),
            }
        )
    return {"least_tokens": published.least_tokens, "published": _summary(real), "generated": rows}


def beside_table(name: ProfileName, folder: Path, published: Published) -> dict[str, Any]:
    table = json.loads((folder / published.file).read_text())[published.client]
    shares = table["quantiles"]
    rows = []
    for seed in SEEDS:
        made = generate(name, seed, requests=CLIENT_REQUESTS)
        prompts = [r.prompt_tokens for r in made.requests]
        outputs = [r.output_tokens for r in made.requests]
        rows.append(
            {
                "seed": seed,
                "input_ks": ks_to_table(prompts, shares, table["input_tokens"]),
                "output_ks": ks_to_table(outputs, shares, table["output_tokens"]),
                **_summary(made),
            }
        )
    return {"client": published.client, "generated": rows}


def _summary(trace: Trace) -> dict[str, Any]:
    numbers = asdict(trace_stats(trace))
    names = ("requests", "turns_mean", "rate", "interarrival_cv", "prompt", "output", "prefix_hit")
    return {name: numbers[name] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="TRACE_DIR")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    args = parser.parse_args()
    profiles = {}
    for name, published in PUBLISHED.items():
        beside = beside_table if published.client else beside_trace
        found = beside(name, args.folder, published)
        profiles[str(name)] = {"file": published.file, **found}
        for row in found["generated"]:
            print(
                f"{name:15} seed {row['seed']}  input KS {row['input_ks']:.3f}  "
                f"output KS {row['output_ks']:.3f}  hit {row['prefix_hit']:.3f}  "
                f"mean {row['prompt']['mean']:,.0f} in, {row['output']['mean']:,.0f} out"
            )
        if "published" in found:
            print(f"{'published':15} {'':46} hit {found['published']['prefix_hit']:.3f}")
    if args.json:
        command = "python scripts/check_profiles.py TRACE_DIR --json FILE"
        record = {**provenance(), "command": command, "profiles": profiles}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
