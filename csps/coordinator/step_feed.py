"""Rows of finished steps for the step log and for watchers, made in a thread of its own."""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType

from csps.coordinator.observer import Observer
from csps.coordinator.step_log import StepLog
from csps.coordinator.steps import FinishedStep
from csps.records.rows import StepRow
from csps.rpc.convert_steps import step_to_proto
from csps.v1 import admin_pb2 as pb

# Steps that go on together, where steps are faster than who takes them.
_BATCH = 64


class Watcher:
    """What one client has still to read; of the event loop's thread alone.

    A full queue loses its oldest step: those that watch want to know what happens now.
    """

    def __init__(self, max_queued: int) -> None:
        self._steps: deque[pb.StepRecord] = deque()
        self._max_queued = max_queued
        self._num_dropped = 0
        self._closed = False
        self._ready = asyncio.Event()

    def put(self, steps: Sequence[pb.StepRecord]) -> None:
        self._steps.extend(steps)
        while len(self._steps) > self._max_queued:
            self._steps.popleft()
            self._num_dropped += 1
        self._ready.set()

    def close(self) -> None:
        self._closed = True
        self._ready.set()

    async def take(self) -> pb.WatchStepsResponse | None:
        """The next steps, once there are any; None when closed and none are left."""
        await self._ready.wait()
        if not self._steps:
            return None
        count = min(_BATCH, len(self._steps))
        steps = [self._steps.popleft() for _ in range(count)]
        response = pb.WatchStepsResponse(steps=steps, num_dropped=self._num_dropped)
        self._num_dropped = 0
        if not self._steps and not self._closed:
            self._ready.clear()
        return response


class StepFeed(Observer):
    """Takes finished steps of an event loop while it is entered there, at no cost to speak of."""

    def __init__(self, make_row: Callable[[FinishedStep], StepRow], log: StepLog | None) -> None:
        self._make_row = make_row
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._watchers: set[Watcher] = set()
        self._closed = False
        self._steps: queue.SimpleQueue[FinishedStep | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="step-rows", daemon=True)

    def on_step(self, step: FinishedStep) -> None:
        if self._log is not None or self._watchers:
            self._steps.put(step)

    def watch(self, max_queued: int) -> Watcher:
        """Steps from now on. The caller gives it to `forget`."""
        watcher = Watcher(max_queued)
        if self._closed:
            watcher.close()
        self._watchers.add(watcher)
        return watcher

    def forget(self, watcher: Watcher) -> None:
        """May be called again."""
        self._watchers.discard(watcher)

    async def __aenter__(self) -> "StepFeed":
        self._thread.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Hand out what is left, then end the watchers' streams."""
        self._closed = True
        self._steps.put(None)
        await asyncio.to_thread(self._thread.join)
        for watcher in self._watchers:
            watcher.close()

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            steps: list[FinishedStep] = [step]
            last: FinishedStep | None = step
            while len(steps) < _BATCH and not self._steps.empty() and last is not None:
                last = self._steps.get()
                if last is not None:
                    steps.append(last)
            self._take(steps)
            if last is None:
                return

    def _take(self, steps: Sequence[FinishedStep]) -> None:
        rows = [self._make_row(step) for step in steps]
        if self._log is not None and not self._log.write(rows):
            self._log = None
        if self._watchers:
            records = [step_to_proto(row) for row in rows]
            self._loop.call_soon_threadsafe(self._hand_out, records)

    def _hand_out(self, records: Sequence[pb.StepRecord]) -> None:
        for watcher in self._watchers:
            watcher.put(records)
