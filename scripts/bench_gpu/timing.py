"""How long a piece of work takes: CUDA events on a GPU, the host's clock without one."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

# Repeats stop when either is reached.
MAX_REPEATS, MIN_REPEATS = 30, 5
REPEAT_FOR_S = 0.5
CPU_REPEATS = 2
# The device waits so long before each repeat that the host has queued the work by then: gaps
# between launches are the host's time, which is reported beside it.
MAX_HEAD_START_S = 0.25
HEAD_START = 1.5  # times what the host took
CYCLES_PER_S = 2e9


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. `first_s`: the first call, compilation and autotuning with it, not in the others.

    `host_s`: until a call returned, the device's work under way or not.
    """

    median_s: float
    low_s: float
    high_s: float
    repeats: int
    first_s: float
    host_s: float

    @property
    def columns(self) -> dict[str, float]:
        """As a row has them; the spread is that of all repeats."""
        return {
            "median_s": self.median_s,
            "low_s": self.low_s,
            "high_s": self.high_s,
            "repeats": self.repeats,
            "first_s": self.first_s,
            "host_s": self.host_s,
        }


class Timer:
    """Times work on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flushed = None
        if device.type == "cuda":
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self._flushed = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

    def __call__(self, work: Callable[[], object], max_repeats: int = MAX_REPEATS) -> Timing:
        """The median of many calls, each with nothing of its inputs in the L2 cache."""
        first_s = self.until_done(work)
        if self._flushed is None:
            times = [self.until_done(work) for _ in range(CPU_REPEATS)]
            return Timing(median(times), min(times), max(times), len(times), first_s, median(times))
        warm_s = self.until_done(work)
        host_s = min(self._host(work) for _ in range(2))
        repeats = min(max(int(REPEAT_FOR_S / warm_s), MIN_REPEATS), max_repeats)
        times = self._events(work, repeats, min(HEAD_START * host_s, MAX_HEAD_START_S))
        return Timing(median(times), min(times), max(times), len(times), first_s, host_s)

    def until_done(self, work: Callable[[], object]) -> float:
        """Seconds from the call until the device has nothing left to do."""
        self._wait()
        begun = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - begun

    def _host(self, work: Callable[[], object]) -> float:
        self._wait()
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    def _events(self, work: Callable[[], object], repeats: int, head_start_s: float) -> list[float]:
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flushed.zero_()
            torch.cuda._sleep(int(head_start_s * CYCLES_PER_S))
            begin.record()
            work()
            end.record()
            # Not all at once: a backlog of launches would stop the host in the middle of one.
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return times

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
