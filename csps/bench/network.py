"""`bench network`: one long prompt over links of a limited rate, by ways to attend."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from rich.console import Console

from csps.bench.link import measure_link
from csps.bench.measure import lane_delta, request
from csps.bench.namespaces import linked
from csps.bench.ranks import serving
from csps.core.attention import AttentionKind
from csps.rpc.client import AttentionChoice, Complete, GenerationClient

Result = dict[str, object]

WARM_UP_TOKENS = 2048
# Of a run; their medians over the runs stand beside the setting.
FIGURES = (
    "ttft_s", "prefill_s", "received_bytes_max", "compute_s", "comm_s", "exposed_comm_s",
    "exposed_share",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class NetworkFlags:
    """What every server of the bench has in common."""

    model: str
    threads_per_rank: int
    dtype: str
    stage_tokens: int
    gamma: float
    csa_wire: str
    csa_min_tokens: int

    def arguments(self) -> list[str]:
        return [
            *("--model", self.model, "--threads-per-rank", str(self.threads_per_rank)),
            *("--dtype", self.dtype, "--stage-tokens", str(self.stage_tokens)),
            *("--csa-gamma", str(self.gamma), "--csa-wire", self.csa_wire),
            *("--csa-min-tokens", str(self.csa_min_tokens), "--log-level", "WARNING"),
            "--no-prefix-cache",
        ]


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to attend. `pipeline` is of the server, `kind` of the request."""

    kind: AttentionKind
    pipeline: bool = True

    @property
    def name(self) -> str:
        return self.kind.value if self.pipeline else f"{self.kind.value}, no pipeline"


def variants(kinds: Sequence[AttentionKind]) -> list[Variant]:
    """Each kind, and the sparse ones also without the pipeline."""
    sparse = [kind for kind in kinds if kind is not AttentionKind.DENSE]
    return [Variant(kind) for kind in kinds] + [Variant(kind, pipeline=False) for kind in sparse]


class Prompts:
    """Equally long parts of one text: another for each round of runs.

    Of one round each kind of attention starts one token later, so that kinds are compared on
    the same text, yet no prompt begins as an earlier one of the same server did: a prefix cache
    has nothing to offer.
    `token_ids` must have `num_needed` of them.
    """

    def __init__(self, token_ids: Sequence[int], num_tokens: int, rounds: int) -> None:
        assert len(token_ids) >= self.num_needed(num_tokens, rounds)
        self._token_ids = token_ids
        self._num_tokens = num_tokens
        self._rounds = rounds

    @staticmethod
    def num_needed(num_tokens: int, rounds: int) -> int:
        return rounds * num_tokens + min(num_tokens, WARM_UP_TOKENS) + len(AttentionKind)

    def measured(self, round_: int, shift: int) -> Sequence[int]:
        start = round_ * self._num_tokens + shift
        return self._token_ids[start : start + self._num_tokens]

    def warm_up(self, shift: int) -> Sequence[int]:
        """Shorter, from behind what is measured."""
        start = self._rounds * self._num_tokens + shift
        return self._token_ids[start : start + min(self._num_tokens, WARM_UP_TOKENS)]


@dataclass(frozen=True, slots=True)
class NetworkBench:
    """What to measure on each of the links."""

    flags: NetworkFlags
    prompts: Prompts
    kinds: Sequence[AttentionKind]
    repeat: int
    latency_ms: float

    def run(self, ranks: Sequence[int], mbit: Sequence[int], console: Console) -> list[Result]:
        """A result for each number of ranks, rate and variant. NamespaceError: no links here."""
        return [
            result
            for num_ranks in ranks
            for rate in mbit
            for result in self._setting(num_ranks, rate, console)
        ]

    def _setting(self, num_ranks: int, mbit: int, console: Console) -> list[Result]:
        results: list[Result] = []
        with linked(num_ranks, mbit, self.latency_ms) as links:
            speed = measure_link(links)
            console.print(f"{num_ranks} ranks, {mbit} Mbit/s (measured: {speed.mbit:.1f})")
            setting = {
                "ranks": num_ranks, "mbit": mbit, "link_mbit": speed.mbit,
                "link_rtt_ms": speed.rtt_ms,
            }  # fmt: skip
            for pipeline in (True, False):
                chosen = [item for item in variants(self.kinds) if item.pipeline == pipeline]
                if not chosen:
                    continue
                flags = [*self.flags.arguments(), "--pipeline", "on" if pipeline else "off"]
                with serving(links, flags) as server:
                    measured = asyncio.run(self._measure(server.target, chosen))
                results += [{**setting, **result} for result in measured]
        return results

    async def _measure(self, target: str, chosen: Sequence[Variant]) -> list[Result]:
        """The variants take turns, so that a slow spell of the machine meets them all."""
        runs: dict[Variant, list[Result]] = {variant: [] for variant in chosen}
        async with GenerationClient(target) as client:
            for variant in chosen:
                prompt = self.prompts.warm_up(self.kinds.index(variant.kind))
                await _prefill(client, prompt, variant)
            for round_ in range(self.repeat):
                for variant in chosen:
                    prompt = self.prompts.measured(round_, self.kinds.index(variant.kind))
                    runs[variant].append(await _prefill(client, prompt, variant))
        return [summary(variant, runs[variant]) for variant in chosen]


async def _prefill(client: GenerationClient, prompt: Sequence[int], variant: Variant) -> Result:
    before = await client.server_info()
    measured = await request(client, prompt, 1, AttentionChoice(kind=variant.kind))
    delta = lane_delta(before, await client.server_info(), "prefill")
    assert measured.complete is not None
    return figures(measured.complete, measured.client_ttft_s, delta)


def figures(complete: Complete, client_ttft_s: float, delta: Result) -> Result:
    """One run. `exposed_share`: of the prefill steps' time, by the average rank."""
    received: list[int] = delta["received_by_rank"]  # type: ignore[assignment]
    rank_s = len(received) * delta["wall_s"]  # type: ignore[operator]
    report = None if complete.sparse is None else asdict(complete.sparse)
    if report is not None:
        del report["heads"]
    return {
        **delta,
        "ttft_s": complete.first_token_s,
        "client_ttft_s": client_ttft_s,
        "prefill_s": delta["wall_s"],
        "received_bytes_max": max(received),
        "exposed_share": delta["exposed_comm_s"] / rank_s,  # type: ignore[operator]
        "sparse": report,
    }


def summary(variant: Variant, runs: list[Result]) -> Result:
    """The medians of a variant's runs, and the runs."""
    return {
        "variant": variant.name,
        "kind": variant.kind.value,
        "pipeline": variant.pipeline,
        **{name: median(run[name] for run in runs) for name in FIGURES},  # type: ignore[type-var]
        "runs": runs,
    }
