"""The coordinator's hand on its ranks: one Attach stream each, plans down, reports up.

Control only. A stream that breaks, a Failure report, silence longer than the heartbeat
timeout or a step longer than the step timeout all mean the same: a rank is lost. Then
`lost` is set, everything that waits fails with UnavailableError, and the fleet is done.
`lost` names the cause: a rank that dies takes the transfers of its peers with it, and what
they report meanwhile is only the consequence.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc

from csps import __version__
from csps.core.config import ServerConfig
from csps.core.errors import UnavailableError
from csps.core.plan import Lane, StepPlan, StepResult
from csps.rpc import convert
from csps.v1 import worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

Commands = asyncio.Queue[worker_pb2.WorkerCommand | None]

# Seconds a weaker explanation waits for a better one: an error on one rank may be the death of
# another, and a stream that broke is explained by the status its process ended with.
ERROR_WAITS_S = 1.0
BROKEN_STREAM_WAITS_S = 0.5


@dataclass(slots=True)
class StepUnderWay:
    """A step that ranks have been sent: results of those that have reported.

    `over`: all have, or one was lost.
    """

    plan: StepPlan
    results: dict[int, StepResult] = field(default_factory=dict)
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Fleet(worker_pb2_grpc.WorkerServicer):
    """All ranks as one: `run` a plan on every rank, `release` sequences, shut down.

    Ranks run a lane's steps in the order of `begin`, each as soon as the one before has ended
    there, so the next may be sent while one is under way.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._commands: dict[int, Commands] = {}
        self._blocks: dict[int, int] = {}
        self._backends: dict[int, str] = {}
        self._devices: dict[int, str] = {}
        self._last_heard: dict[int, float] = {}
        self._steps: dict[tuple[Lane, int], StepUnderWay] = {}
        self._all_ready = asyncio.Event()
        self._stopping = False
        self._attached: set[int] = set()
        self._all_left = asyncio.Event()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    # --- used by the coordinator -----------------------------------------------------

    async def wait_ready(self) -> int:
        """KV blocks that every rank can hold (the smallest pool), once all have joined."""
        waiting = asyncio.ensure_future(self._all_ready.wait())
        try:
            events: set[asyncio.Future[Any]] = {waiting, self.lost}
            await asyncio.wait(
                events,
                timeout=self._config.start_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            waiting.cancel()
        if self.lost.done():
            raise UnavailableError(self.lost.result())
        if not self._all_ready.is_set():
            raise UnavailableError(
                f"{len(self._blocks)} of {self._config.num_ranks} ranks were ready after "
                f"{self._config.start_timeout_s:.0f} s (start timeout)"
            )
        return min(self._blocks.values())

    @property
    def attention_backends(self) -> list[str]:
        """Whose kernels attend, in rank order; complete once `wait_ready` has returned."""
        return [self._backends[rank] for rank in sorted(self._backends)]

    @property
    def devices(self) -> list[str]:
        """What computes, "cpu" or "cuda", in rank order; complete as above."""
        return [self._devices[rank] for rank in sorted(self._devices)]

    async def run(self, plan: StepPlan) -> list[StepResult]:
        """`begin` and `results_of` in one."""
        return await self.results_of(self.begin(plan))

    def begin(self, plan: StepPlan) -> StepUnderWay:
        """Send a step to all ranks. UnavailableError if one is lost."""
        if self.lost.done():
            raise UnavailableError(self.lost.result())
        step = StepUnderWay(plan)
        self._steps[plan.lane, plan.step_id] = step
        by_shard: dict[int, worker_pb2.WorkerCommand] = {}
        for rank, commands in self._commands.items():
            shard = self._config.kv_shard(rank)
            if shard not in by_shard:
                by_shard[shard] = worker_pb2.WorkerCommand(plan=convert.plan_to_proto(plan, shard))
            commands.put_nowait(by_shard[shard])
        return step

    async def results_of(self, step: StepUnderWay) -> list[StepResult]:
        """Results in rank order, when every rank has finished. UnavailableError if one is lost."""
        plan = step.plan
        try:
            # Not wait_for: before Python 3.12 it returns the result, and swallows a cancellation,
            # when both come at once. The lane would go on, and nobody answer its next step.
            async with asyncio.timeout(self._config.step_timeout_s):
                await step.over.wait()
        except TimeoutError:
            missing = sorted(set(self._commands) - set(step.results))
            self._lose(
                f"rank {missing} did not finish {plan.lane} step {plan.step_id} within "
                f"{self._config.step_timeout_s:.0f} s (step timeout)"
            )
            raise UnavailableError(self.lost.result()) from None
        finally:
            del self._steps[plan.lane, plan.step_id]
        if len(step.results) < self._config.num_ranks:
            raise UnavailableError(self.lost.result())
        return [step.results[rank] for rank in sorted(step.results)]

    def release(self, seq_ids: Iterable[int]) -> None:
        """Drop the ranks' state of sequences that have no step under way."""
        command = worker_pb2.WorkerCommand(release=worker_pb2.Release(seq_ids=seq_ids))
        for commands in self._commands.values():
            commands.put_nowait(command)

    async def watch_heartbeats(self) -> None:
        """Runs for ever: loses a rank that has been silent for too long."""
        limit = self._config.heartbeat_timeout_s
        while True:
            await asyncio.sleep(limit / 4)
            now = time.monotonic()
            for rank, heard in self._last_heard.items():
                if now - heard > limit:
                    self._lose(f"rank {rank} was silent for {now - heard:.0f} s")

    def stop(self) -> None:
        """Ask every rank to exit after its steps; from now on none can be lost.

        Those that still load listen to no command: the end of their stream tells them. So it does
        where a rank was lost: the others must not end as if all were well, or whoever started them
        (torchrun) waits for the one that is gone.
        """
        if self._stopping:
            return
        self._stopping = True
        for rank, commands in self._commands.items():
            if rank in self._blocks and not self.lost.done():
                commands.put_nowait(worker_pb2.WorkerCommand(shutdown=worker_pb2.Shutdown()))
            commands.put_nowait(None)
        if not self._attached:
            self._all_left.set()

    async def shutdown(self, grace_s: float) -> None:
        """`stop`, then wait until every rank has left, `grace_s` seconds at most."""
        self.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._all_left.wait()

    def report_lost(self, reason: str) -> None:
        """Called by whoever learns first that a rank died (the process launcher)."""
        self._lose(reason)

    # --- the ranks' side --------------------------------------------------------------

    async def Attach(
        self,
        request_iterator: AsyncIterator[worker_pb2.WorkerReport],
        context: grpc.aio.ServicerContext[worker_pb2.WorkerReport, worker_pb2.WorkerCommand],
    ) -> AsyncIterator[worker_pb2.WorkerCommand]:
        """One rank's stream, for its life."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("report") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first report must be hello")
        hello = first.hello
        problem = self._refuse(hello)
        if problem:
            logger.warning(
                "refused rank %d from %s (pid %d): %s", hello.rank, hello.host, hello.pid, problem
            )
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, problem)
        rank = hello.rank
        commands: Commands = asyncio.Queue()
        self._commands[rank] = commands
        self._attached.add(rank)
        self._last_heard[rank] = time.monotonic()
        logger.info("rank %d joined from %s (pid %d)", rank, hello.host, hello.pid)
        reader = asyncio.create_task(self._read(rank, request_iterator, commands))
        try:
            yield worker_pb2.WorkerCommand(setup=convert.setup_to_proto(self._config.setup))
            while (command := await commands.get()) is not None:
                yield command
            if rank in self._blocks and not self.lost.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await reader  # the rank closes its side when its last step is done
        finally:
            reader.cancel()
            self._attached.discard(rank)
            if self._stopping and not self._attached:
                self._all_left.set()
            reason = f"rank {rank} (pid {hello.pid} on {hello.host}) left"
            self._lose_later(BROKEN_STREAM_WAITS_S, reason)

    def _refuse(self, hello: worker_pb2.Hello) -> str | None:
        if hello.version != __version__:
            return f"worker version {hello.version} differs from the coordinator's {__version__}"
        if hello.world_size != self._config.num_ranks:
            return (
                f"worker was launched with {hello.world_size} ranks, the coordinator expects "
                f"{self._config.num_ranks} (--ranks)"
            )
        if hello.rank in self._commands:
            return f"rank {hello.rank} has joined already"
        if self.lost.done() or self._stopping:
            return "the coordinator is stopping"
        return None

    async def _read(
        self, rank: int, reports: AsyncIterator[worker_pb2.WorkerReport], commands: Commands
    ) -> None:
        try:
            async for report in reports:
                self._last_heard[rank] = time.monotonic()
                self._on_report(rank, report)
        except Exception:
            logger.exception("reading reports of rank %d failed", rank)
        commands.put_nowait(None)

    def _on_report(self, rank: int, report: worker_pb2.WorkerReport) -> None:
        kind = report.WhichOneof("report")
        if kind == "result":
            self._on_result(convert.result_from_proto(report.result, rank))
        elif kind == "ready":
            self._blocks[rank] = report.ready.num_blocks
            self._backends[rank] = report.ready.attention_backend
            self._devices[rank] = report.ready.device
            if len(self._blocks) == self._config.num_ranks:
                self._all_ready.set()
        elif kind == "failure":
            # An error meant for the operator comes without a traceback, and is its own cause.
            trace = report.failure.traceback
            reason = f"rank {rank} failed: {report.failure.message}"
            self._lose_later(ERROR_WAITS_S if trace else 0.0, reason, trace)

    def _on_result(self, result: StepResult) -> None:
        step = self._steps.get((result.lane, result.step_id))
        if step is None:
            self._lose(
                f"rank {result.rank} reported {result.lane} step {result.step_id}, which is "
                "not under way"
            )
            return
        step.results[result.rank] = result
        if len(step.results) == self._config.num_ranks:
            step.over.set()

    def _lose_later(self, delay_s: float, reason: str, trace: str = "") -> None:
        """`_lose`, unless a better reason comes before."""
        if not self._stopping:
            asyncio.get_running_loop().call_later(delay_s, self._lose, reason, trace)

    def _lose(self, reason: str, trace: str = "") -> None:
        if self.lost.done() or self._stopping:
            return
        if trace:
            logger.error("%s\n%s", reason, trace)
        self.lost.set_result(reason)
        for step in self._steps.values():
            step.over.set()
