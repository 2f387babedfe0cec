"""A lane is a thread that runs its plans in order, beside the other lane.

A running stream keeps its tokens coming while a long prompt keeps every core busy: on a CPU the
prefill lane's thread gives way to the decode lane's (niceness), on a GPU each lane has a stream
of its own, the decode lane's of high priority.
"""

import os
import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from csps.core.plan import Lane, StepPlan, StepResult
from csps.engine.cuda_graphs import URGENT
from csps.engine.runner import Runner

# The weight of a nice-10 thread is about a tenth of a nice-0 one's (Linux, sched(7)).
PREFILL_NICENESS = 10


class LaneThread:
    """Runs one lane's plans. `report` is called in the lane's thread, `fail` at most once."""

    def __init__(
        self,
        lane: Lane,
        runner: Runner,
        *,
        num_threads: int,
        report: Callable[[StepResult], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._lane = lane
        self._runner = runner
        self._num_threads = num_threads
        self._report = report
        self._fail = fail
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._next_step = 0
        self._thread = threading.Thread(target=self._main, name=f"{lane}-lane", daemon=True)
        self._thread.start()

    def put(self, plan: StepPlan) -> None:
        self._plans.put(plan)

    def close(self) -> None:
        """Finish the plans that were put, then end the thread."""
        self._plans.put(None)
        self._thread.join()

    def _main(self) -> None:
        if self._lane is Lane.PREFILL and self._runner.device.type == "cpu":
            _give_way(threading.get_native_id())
        # Thread-local in OpenMP: each lane has its own team.
        torch.set_num_threads(self._num_threads)
        try:
            with _stream(self._lane, self._runner.device):
                while (plan := self._plans.get()) is not None:
                    self._check_order(plan)
                    self._report(self._runner.run(plan))
        except BaseException as error:
            self._fail(error)

    def _check_order(self, plan: StepPlan) -> None:
        if plan.step_id != self._next_step:
            raise RuntimeError(
                f"{plan.lane} step {plan.step_id} came where {self._next_step} was expected"
            )
        self._next_step += 1


def _stream(lane: Lane, device: torch.device) -> AbstractContextManager[object]:
    """Where a lane's kernels queue, as the thread's current stream and device."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device, priority=URGENT if lane is Lane.DECODE else 0)
    stream.wait_stream(torch.cuda.default_stream(device))  # on which the weights were loaded
    return torch.cuda.stream(stream)


def _give_way(thread_id: int) -> None:
    """Lower one thread's priority, from whatever the process was started with."""
    niceness = os.getpriority(os.PRIO_PROCESS, thread_id) + PREFILL_NICENESS
    os.setpriority(os.PRIO_PROCESS, thread_id, min(niceness, 19))
