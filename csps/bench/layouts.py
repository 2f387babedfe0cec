"""`bench layouts`: decode batches of many sizes in fixed layouts and in those the model chooses."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from csps.bench.measure import Measured, ServerFlags, request
from csps.bench.server import ServerProcess
from csps.records.rows import STEPS_FILE
from csps.rpc.client import GenerationClient

MODEL = "model"  # the server whose cost model chooses
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "sp": ("--layout", "sp"),
    "tp": ("--layout", "tp"),
    MODEL: (),
}
WARM_UP_STREAMS = 2


class Run(NamedTuple):
    """One batch on one server. `begun`, `ended`: of time.time, as in the step log."""

    variant: str
    size: int
    round: int
    begun: float
    ended: float
    gaps_ms: list[float]  # while all streams decoded


def whole_batch_gaps_ms(arrivals: Sequence[Sequence[float]]) -> list[float]:
    """Gaps while every stream decodes: no prefill of others is in them, and no smaller batch.

    `arrivals`: seconds, of each stream's tokens.
    """
    begun = max(stream[0] for stream in arrivals)
    ended = min(stream[-1] for stream in arrivals)
    return [
        1e3 * (later - earlier)
        for stream in arrivals
        for earlier, later in pairwise(stream)
        if earlier >= begun and later <= ended
    ]


def in_turn(number: int) -> list[str]:
    """The servers in the order of this batch: each is first in its turn, so drift favours none."""
    names = list(VARIANTS)
    first = number % len(names)
    return names[first:] + names[:first]


@dataclass(slots=True)
class LayoutsBench:
    """Three servers, of which one at a time has work. `runs` grows while `run` runs."""

    flags: ServerFlags
    sizes: Sequence[int]
    rounds: int
    prompts: Callable[[int, int], Sequence[Sequence[int]]]  # of a round and size
    output: int
    logs: Path  # a directory for the step logs, NAME/steps.jsonl
    report: Callable[[str], None]
    runs: list[Run] = field(default_factory=list)

    def run(self) -> None:
        """Start the servers, and send all batches in all rounds."""
        with ExitStack() as stack:
            targets = {}
            for name, layout in VARIANTS.items():
                self.report(f"starting the server {name}")
                log = self.logs / name / STEPS_FILE
                log.parent.mkdir()
                server = ServerProcess(*self.flags.arguments(), *layout, "--step-log", str(log))
                targets[name] = stack.enter_context(server).target
            asyncio.run(self._run(targets))

    async def _run(self, targets: Mapping[str, str]) -> None:
        for name, target in targets.items():
            async with GenerationClient(target) as client:
                self.report(f"warming up {name}")
                await _batch(client, self.prompts(0, self.sizes[0])[:WARM_UP_STREAMS], self.output)
        for round_ in range(self.rounds):
            for index, size in enumerate(self.sizes):
                self.report(f"round {round_ + 1} of {self.rounds}, {size} streams")
                prompts = self.prompts(round_, size)
                for name in in_turn(round_ + index):
                    async with GenerationClient(targets[name]) as client:
                        begun = time.time()
                        streams = await _batch(client, prompts, self.output)
                    gaps = whole_batch_gaps_ms([stream.arrivals for stream in streams])
                    self.runs.append(Run(name, size, round_, begun, time.time(), gaps))


async def _batch(
    client: GenerationClient, prompts: Sequence[Sequence[int]], output: int
) -> list[Measured]:
    return list(await asyncio.gather(*(request(client, prompt, output) for prompt in prompts)))
