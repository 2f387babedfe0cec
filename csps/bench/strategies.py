"""`bench strategies`: the same requests at the same times, to one configuration after another."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from csps.bench.measure import Measured, follow, request
from csps.bench.strategies_load import Arrival
from csps.bench.strategies_score import UNFINISHED, Sample
from csps.core.errors import ConfigError
from csps.percentiles import gaps_ms
from csps.rpc.client import GenerationClient, ServerError

REPORT_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Configuration:
    """A server to compare: `flags` of csps serve."""

    name: str
    flags: tuple[str, ...]


# The best of each on a machine with two cores is among them: one rank with both, or two ranks; a
# small step for chats that wait, or a large one that costs less per token.
FOR_TWO_CORES = (
    *(
        f"csps-{stage}=--strategy csps --workers 2 --stage-tokens {stage}"
        for stage in (512, 1024, 2048)
    ),
    "ring-1024=--strategy ring --workers 2 --stage-tokens 1024",
    *(
        f"sarathi-1x2-{budget}=--strategy sarathi --workers 1 --threads-per-rank 2 "
        f"--token-budget {budget}"
        for budget in (256, 512, 1024)
    ),
    "sarathi-tp2-512=--strategy sarathi --workers 2 --token-budget 512",
    *(
        f"shift-{budget}=--strategy shift --workers 2 --token-budget {budget}"
        for budget in (512, 2048)
    ),
)


@dataclass(slots=True)
class _Sent:
    """A request on its way; `error` until it has ended well."""

    arrival: Arrival
    measured: Measured
    ended: float = 0.0
    error: str | None = UNFINISHED

    def sample(self, begun: float) -> Sample:
        arrivals = self.measured.arrivals
        # What an unfinished request waits for is not there yet: so far is a lower bound.
        seen = arrivals if self.error is None else [*arrivals, self.ended]
        return Sample(
            kind=self.arrival.kind,
            at_s=self.arrival.at_s,
            sent_s=self.measured.sent - begun,
            prompt_tokens=self.arrival.num_tokens,
            output_tokens=len(arrivals),
            error=self.error,
            ttft_s=seen[0] - self.measured.sent,
            response_s=seen[-1] - self.measured.sent,
            gaps_ms=tuple(gaps_ms(seen)),
        )


@dataclass(slots=True)
class Playback:
    """Sends a load to one server, open loop: no request waits for another's answer."""

    arrivals: Sequence[Arrival]
    prompts: Sequence[Sequence[int]]
    warm_up: Sequence[Sequence[int]]
    drain_s: float  # for those that have not ended when the last is sent
    report: Callable[[str], None]
    _sent: list[_Sent] = field(default_factory=list)

    async def run(self, target: str, longest: int) -> tuple[str, list[Sample]]:
        """The server's strategy, and what became of each request.

        ConfigError if `longest`, prompt and output, does not fit the model; ServerError if the
        server does not answer before the load begins.
        """
        async with GenerationClient(target) as client:
            limit = (await client.model_info()).max_model_len
            if longest > limit:
                raise ConfigError(
                    f"--doc-tokens, --chat-tokens: {longest} tokens with the output, the model "
                    f"has room for {limit}"
                )
            for token_ids in self.warm_up:
                await request(client, token_ids, 4)
            strategy = (await client.server_info()).strategy
            return strategy, await self._play(client)

    async def _play(self, client: GenerationClient) -> list[Sample]:
        begun = time.monotonic()
        tasks = [asyncio.create_task(self._report_often(begun))]
        try:
            for arrival, token_ids in zip(self.arrivals, self.prompts, strict=True):
                await asyncio.sleep(max(begun + arrival.at_s - time.monotonic(), 0.0))
                sent = _Sent(arrival, Measured(time.monotonic()))
                self._sent.append(sent)
                tasks.append(asyncio.create_task(_send(client, token_ids, sent)))
            done, _ = await asyncio.wait(tasks[1:], timeout=self.drain_s)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [sent.sample(begun) for sent in self._sent]

    async def _report_often(self, begun: float) -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            ended = sum(sent.ended > 0 for sent in self._sent)
            self.report(
                f"{time.monotonic() - begun:.0f} s, {len(self._sent)} of {len(self.arrivals)} "
                f"requests sent, {ended} ended"
            )


async def _send(client: GenerationClient, token_ids: Sequence[int], sent: _Sent) -> None:
    try:
        await follow(client, token_ids, sent.arrival.output, sent.measured)
        sent.error = None
    except ServerError as error:
        sent.error = str(error)
    finally:
        sent.ended = time.monotonic()
