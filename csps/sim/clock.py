"""The virtual clock: what happens next, and when."""

import heapq
from collections.abc import Callable
from typing import Any

Action = Callable[..., None]


class Clock:
    """Runs actions in order of time, those of one time in the order in which they were asked for.

    Seconds since the run began.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Action, tuple[Any, ...]]] = []
        self._asked = 0

    def at(self, time: float, action: Action, *arguments: Any) -> None:
        """Call `action(*arguments)` at `time`, which is not over."""
        assert time >= self.now, f"{time} was before {self.now}"
        self._asked += 1
        heapq.heappush(self._events, (time, self._asked, action, arguments))

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._events:
            time, _, action, arguments = heapq.heappop(self._events)
            assert time >= self.now, "time went backwards"
            self.now = time
            action(*arguments)
