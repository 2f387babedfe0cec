"""`bench layouts`: decode batches of many sizes, whose steps have each layout in turn."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from csps.bench.measure import Measured, ServerFlags, request
from csps.bench.server import ServerProcess
from csps.rpc.client import GenerationClient

# One step in the layout that the cost model chose, one in the other: neighbours in time, so that
# a machine that gets slower slows both.
TURNS = ("--probe-every", "2")
WARM_UP_STREAMS = 2


class Run(NamedTuple):
    """One batch. `begun`, `ended`: of time.time, as in the step log."""

    size: int
    round: int
    begun: float
    ended: float


@dataclass(slots=True)
class LayoutsBench:
    """One server. `runs` grows while `run` runs."""

    flags: ServerFlags
    sizes: Sequence[int]
    rounds: int
    prompts: Callable[[int, int], Sequence[Sequence[int]]]  # of a round and size
    output: int
    log: Path  # where the server puts its step log
    report: Callable[[str], None]
    runs: list[Run] = field(default_factory=list)

    def run(self) -> None:
        """Start the server, and send all batches in all rounds."""
        self.report("starting the server")
        arguments = (*self.flags.arguments(), *TURNS, "--step-log", str(self.log))
        with ServerProcess(*arguments) as server:
            asyncio.run(self._run(server.target))

    async def _run(self, target: str) -> None:
        async with GenerationClient(target) as client:
            self.report("warming up")
            await _batch(client, self.prompts(0, self.sizes[0])[:WARM_UP_STREAMS], self.output)
            for round_ in range(self.rounds):
                for size in self.sizes:
                    self.report(f"round {round_ + 1} of {self.rounds}, {size} streams")
                    begun = time.time()
                    await _batch(client, self.prompts(round_, size), self.output)
                    self.runs.append(Run(size, round_, begun, time.time()))


async def _batch(
    client: GenerationClient, prompts: Sequence[Sequence[int]], output: int
) -> list[Measured]:
    return list(await asyncio.gather(*(request(client, prompt, output) for prompt in prompts)))
