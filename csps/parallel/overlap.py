"""Transfers beside computation: handles, and the clock that says what they cost.

On CPU (Gloo) a transfer runs in a communication thread that waits for it, so its true
end is known; on CUDA (NCCL) it is queued on the communicator's stream and `wait` makes
the current stream wait, not the host.
"""

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
import torch.distributed as dist


class Handle(Protocol):
    """A transfer under way. Its buffers must not be touched before `wait` returns."""

    def wait(self) -> None: ...


class CommClock:
    """What the transfers of one lane cost since the last `reset`.

    comm_s: a transfer was under way; exposed_s: the lane had to wait for one; both in
    seconds of this rank. bytes_sent, bytes_received: payload bytes of this rank, by kind.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.comm_s = 0.0
        self.exposed_s = 0.0
        self.bytes_sent: Counter[str] = Counter()
        self.bytes_received: Counter[str] = Counter()


class NothingToWaitFor:
    """The handle of a transfer of no messages."""

    def wait(self) -> None:
        return


class InlineHandle:
    """Asynchronous works posted by the caller's own thread.

    Their true end is not seen: comm_s counts from posting to the end of `wait`, an upper
    bound that is close where the caller waits soon (decode).
    """

    def __init__(self, works: list[dist.Work], clock: CommClock) -> None:
        self._works = works
        self._clock = clock
        self._posted = time.perf_counter()

    def wait(self) -> None:
        begun = time.perf_counter()
        for work in self._works:
            work.wait()
        ended = time.perf_counter()
        self._clock.exposed_s += ended - begun
        self._clock.comm_s += ended - self._posted


class _ThreadHandle:
    def __init__(self, future: "Future[float]", clock: CommClock) -> None:
        self._future = future
        self._clock = clock

    def wait(self) -> None:
        begun = time.perf_counter()
        self._clock.comm_s += self._future.result()
        self._clock.exposed_s += time.perf_counter() - begun


class CommThread:
    """One thread that runs transfers in the order they were given and times each."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    def submit(self, post: Callable[[], list[dist.Work]], clock: CommClock) -> Handle:
        """Run `post` and wait for the works it returns, beside the caller."""
        return _ThreadHandle(self._pool.submit(_run, post), clock)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


@torch.inference_mode()  # the buffers were made under it, in the lane's thread
def _run(post: Callable[[], list[dist.Work]]) -> float:
    begun = time.perf_counter()
    for work in post():
        work.wait()
    return time.perf_counter() - begun
