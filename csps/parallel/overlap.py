"""Transfers beside computation: handles, and the clock that says what they cost.

On CPU (Gloo) a transfer runs in a communication thread that waits for it, so its true
end is known; on CUDA (NCCL) it is queued on the communicator's stream and `wait` makes
the current stream wait, not the host: there time is that of the current stream, by events. So
it is where GPUs are shared (csps.parallel.staged), though there the host waits as well.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist


class Handle(Protocol):
    """A transfer under way. Its buffers must not be touched before `wait` returns."""

    def wait(self) -> None: ...


Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """Now; on a GPU, when the current stream comes here.

    What a CUDA graph captures is not timed: its events could not be read.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class CommClock:
    """What the transfers of one lane cost since the last `reset`.

    comm_s: a transfer was under way; exposed_s: the lane had to wait for one; both in
    seconds of this rank, complete after `settle`. bytes_sent, bytes_received: payload bytes of
    this rank, by kind.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.comm_s = 0.0
        self.exposed_s = 0.0
        self.bytes_sent: Counter[str] = Counter()
        self.bytes_received: Counter[str] = Counter()
        self._waits: list[tuple[Mark, Mark, Mark]] = []

    def count(self, sent: Mapping[str, int], received: Mapping[str, int]) -> None:
        """Payload bytes of transfers that nobody else counts, by kind."""
        self.bytes_sent.update(sent)
        self.bytes_received.update(received)

    def waited(self, posted: Mark, begun: Mark, ended: Mark) -> None:
        """Of a transfer: when it was posted, and waited for."""
        self._waits.append((posted, begun, ended))

    def settle(self) -> None:
        """Add up what was waited for. On a GPU the stream must have come to its end."""
        for posted, begun, ended in self._waits:
            self.comm_s += _seconds(posted, ended)
            self.exposed_s += _seconds(begun, ended)
        self._waits.clear()


def _seconds(begun: Mark, ended: Mark) -> float:
    if isinstance(begun, torch.cuda.Event):
        return begun.elapsed_time(ended) / 1e3
    assert not isinstance(ended, torch.cuda.Event), "marks of two clocks"
    return ended - begun


class NothingToWaitFor:
    """The handle of a transfer of no messages."""

    def wait(self) -> None:
        return


class InlineHandle:
    """Asynchronous works posted by the caller's own thread.

    Their true end is not seen: comm_s counts from posting to the end of `wait`, an upper
    bound that is close where the caller waits soon (decode).
    """

    def __init__(self, works: list[dist.Work], clock: CommClock, device: torch.device) -> None:
        self._works = works
        self._clock = clock
        self._device = device
        self._posted = mark(device)

    def wait(self) -> None:
        begun = mark(self._device)
        for work in self._works:
            work.wait()
        self._clock.waited(self._posted, begun, mark(self._device))


class Span(NamedTuple):
    """When something began and ended, in seconds of time.perf_counter."""

    begun: float
    ended: float


class ThreadHandle:
    """A transfer that a CommThread runs and times."""

    def __init__(self, future: "Future[Span]", clock: CommClock) -> None:
        self._future = future
        self._clock = clock

    def wait(self) -> None:
        begun = time.perf_counter()
        transfer = self._future.result()
        self._clock.comm_s += transfer.ended - transfer.begun
        # Without what it waited for before, such as the thread to be scheduled.
        self._clock.exposed_s += max(transfer.ended - max(transfer.begun, begun), 0.0)


class CommThread:
    """One thread that runs transfers in the order they were given and times each."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    def submit(self, post: Callable[[], list[dist.Work]]) -> "Future[Span]":
        """Run `post` and wait for the works it returns, beside the caller."""
        return self._pool.submit(_run, post)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


@torch.inference_mode()  # the buffers were made under it, in the lane's thread
def _run(post: Callable[[], list[dist.Work]]) -> Span:
    begun = time.perf_counter()
    for work in post():
        work.wait()
    return Span(begun, time.perf_counter())
