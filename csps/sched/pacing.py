"""When decode takes its next step while prompts are prefilled beside it.

Both lanes share the processors, and a decode step costs much the same for few sequences as for
many. Steps as often as possible give the shortest gaps between tokens. But where a step keeps the
processors busy (CPUs: beside one prefill has a fifth to a half of its speed), prompts wait for
them, and sequences that could share a step are not there yet. With a target for the gap, steps come
no more often than it asks for, and prefill has what is left.
"""

import math
from dataclasses import dataclass, field


@dataclass(slots=True)
class DecodePace:
    """Steps begin `target_s` seconds apart, or further, while there is prefill; 0: no limit.

    Times are of the caller's clock, in seconds.
    """

    target_s: float = 0.0
    _started_s: float = field(default=-math.inf, init=False)

    def next_s(self, num_prefilling: int) -> float:
        """When the next step may begin. `num_prefilling`: sequences in prefill now."""
        return self._started_s + self.target_s if num_prefilling else -math.inf

    def note_start(self, now_s: float) -> None:
        """A step begins."""
        self._started_s = now_s
