"""`bench quality`: what ways to attend lose, on the same prompts in one server."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from statistics import fmean

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from csps.bench.measure import ServerFlags, lane_delta, request
from csps.bench.quality_prompts import NEEDLE_TASKS, Case
from csps.bench.quality_score import Row, agreement, perplexity
from csps.checkpoint.config import read_config
from csps.checkpoint.locate import locate
from csps.core.attention import AttentionKind
from csps.core.errors import ConfigError
from csps.core.request import SamplingParams
from csps.rpc.client import AttentionChoice, Chunk, Complete, GenerationClient

TASKS = (*NEEDLE_TASKS, "ppl", "agreement")
ANSWER_TOKENS = 12  # a number of seven digits, and a few words before it
AGREEMENT_TOKENS = 64
SCORED_TOKENS = 1024
WARM_UP_TOKENS = 2048
SAVE_EVERY = 8  # rows
SPEED_WINDOW_S = 900.0  # of the estimated time left


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to attend, as a request asks for it."""

    name: str
    choice: AttentionChoice

    @property
    def kind(self) -> AttentionKind:
        assert self.choice.kind is not None
        return self.choice.kind


DENSE_VARIANT = Variant("dense", AttentionChoice(AttentionKind.DENSE))


def variants(
    kinds: Sequence[AttentionKind], gammas: Sequence[float], windows: Sequence[int]
) -> list[Variant]:
    """Dense first: the others are compared with it. No gamma or window: the server's."""
    found: list[Variant] = []
    for kind in sorted(kinds, key=lambda kind: kind is not AttentionKind.DENSE):
        if kind is AttentionKind.CSA and gammas:
            found += [
                Variant(f"{kind} {gamma:g}", AttentionChoice(kind, gamma=gamma)) for gamma in gammas
            ]
        elif kind is AttentionKind.CSA_DISTANCE and windows:
            found += [
                Variant(f"{kind} {blocks}", AttentionChoice(kind, window_blocks=blocks))
                for blocks in windows
            ]
        else:
            found.append(Variant(kind.value, AttentionChoice(kind)))
    return found


def dense_kv_bytes(flags: ServerFlags, num_tokens: int) -> float:
    """Keys and values of a prompt that a rank does not hold: (P-1)/P * S * 2 * Hkv * D * e * L."""
    config = read_config(locate(flags.model))
    element_bytes = 4 if flags.dtype == "float32" else 2
    token_bytes = 2 * config.num_kv_heads * config.head_dim * element_bytes * config.num_layers
    return (flags.ranks - 1) / flags.ranks * num_tokens * token_bytes


@dataclass(slots=True)
class QualityBench:
    """Prompts and ways to attend. `rows` grows while `run` runs, and stays if that is ended."""

    flags: ServerFlags
    cases: Iterable[Case]
    total_tokens: int  # of the cases: how far the bench is
    tasks: Sequence[str]
    variants: Sequence[Variant]
    decode: Callable[[Sequence[int]], str]
    save: Callable[[Sequence[Row]], None]  # called every few rows
    rows: list[Row] = field(default_factory=list)

    async def run(self, target: str, longest: int, console: Console) -> None:
        """Send every prompt with every variant; `longest`: tokens of the longest prompt.

        ConfigError if the longest does not fit the model; ServerError.
        """
        async with GenerationClient(target) as client:
            await self._check_fits(client, longest)
            with _progress(console) as (progress, task_id):
                progress.update(task_id, total=self.total_tokens * len(self.variants))
                for number, case in enumerate(self.cases):
                    if number == 0:
                        await self._warm_up(client, case)
                    dense: Row | None = None
                    for variant in self.variants:
                        what = f"{case.task} {case.tokens} #{case.index} {variant.name}"
                        progress.update(task_id, description=what)
                        row = await self._ask(client, case, variant, dense)
                        dense = dense or row
                        self._add(row, progress, task_id)
                        progress.advance(task_id, case.tokens)

    async def _check_fits(self, client: GenerationClient, longest: int) -> None:
        limit = (await client.model_info()).max_model_len
        output = AGREEMENT_TOKENS if "agreement" in self.tasks else ANSWER_TOKENS
        if longest + output > limit:
            raise ConfigError(
                f"--tokens: {longest} and {output} of output exceed the model's {limit} tokens"
            )

    async def _warm_up(self, client: GenerationClient, case: Case) -> None:
        for kind in dict.fromkeys(variant.kind for variant in self.variants):
            await request(client, case.token_ids[:WARM_UP_TOKENS], 2, AttentionChoice(kind))

    def _add(self, row: Row, progress: Progress, task_id: TaskID) -> None:
        self.rows.append(row)
        if len(self.rows) % SAVE_EVERY:
            return
        self.save(self.rows)
        if not progress.console.is_terminal:  # where a bar that is redrawn shows nothing
            task = progress.tasks[task_id]
            left = "?" if task.time_remaining is None else f"{task.time_remaining / 60:.0f}"
            progress.console.print(f"{task.percentage:.0f}% ({left} min left), {task.description}")

    async def _ask(
        self, client: GenerationClient, case: Case, variant: Variant, dense: Row | None
    ) -> Row:
        sampling = self._sampling(case)
        before = await client.server_info()
        token_ids: list[int] = []
        complete: Complete | None = None
        async with aclosing(
            client.generate(case.token_ids, sampling, attention=variant.choice)
        ) as events:
            async for event in events:
                if isinstance(event, Chunk):
                    token_ids += event.token_ids
                elif isinstance(event, Complete):
                    complete = event
        delta = lane_delta(before, await client.server_info(), "prefill")
        assert complete is not None
        return {
            "task": case.task,
            "tokens": case.tokens,
            "index": case.index,
            "variant": variant.name,
            "kind": variant.kind.value,
            "prompt_tokens": complete.prompt_tokens,
            **self._prefill(complete, delta),
            **self._outcome(case, token_ids, complete, dense),
        }

    def _sampling(self, case: Case) -> SamplingParams:
        if case.task in NEEDLE_TASKS:
            return SamplingParams(max_tokens=ANSWER_TOKENS)
        scored = min(SCORED_TOKENS, len(case.token_ids) - 1) if "ppl" in self.tasks else None
        output = AGREEMENT_TOKENS if "agreement" in self.tasks else 1
        return SamplingParams(max_tokens=output, ignore_eos=True, prompt_logprobs=scored)

    def _prefill(self, complete: Complete, delta: dict[str, object]) -> Row:
        received: list[int] = delta["received_by_rank"]  # type: ignore[assignment]
        mean, most = fmean(received), max(received)
        dense = dense_kv_bytes(self.flags, complete.prompt_tokens)
        report = None if complete.sparse is None else asdict(complete.sparse)
        if report is not None:
            del report["heads"]
        return {
            "ttft_s": complete.first_token_s,
            "received_by_rank": received,
            "received_bytes_mean": mean,
            "received_bytes_max": most,
            "dense_kv_bytes": dense,
            "received_over_dense_kv_mean": mean / dense if dense else None,
            "received_over_dense_kv_max": most / dense if dense else None,
            "sparse": report,
        }

    def _outcome(
        self, case: Case, token_ids: list[int], complete: Complete, dense: Row | None
    ) -> Row:
        """`dense`: the row of the same prompt under dense attention; None: this is it."""
        if case.task in NEEDLE_TASKS:
            output = self.decode(token_ids)
            return {
                "depth": case.depth,
                "answer": case.answer,
                "output": output,
                "correct": case.answer in output,
            }
        row: Row = {"source": case.source}
        if "ppl" in self.tasks:
            value = perplexity(complete.prompt_logprobs)
            base: float = value if dense is None else dense["ppl"]["value"]  # type: ignore[index]
            row["ppl"] = {"value": value, "over_dense": value / base}
        if "agreement" in self.tasks:
            others = token_ids if dense is None else dense["token_ids"]
            equal, prefix = agreement(token_ids, others)  # type: ignore[arg-type]
            row["agreement"] = {"equal": equal, "common_prefix": prefix}
            row["token_ids"] = token_ids
        return row


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[tuple[Progress, TaskID]]:
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=SPEED_WINDOW_S,
    ) as progress:
        yield progress, progress.add_task("warming up")
