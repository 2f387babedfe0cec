"""One JSON line per step, for whoever studies what a server did. Written off the event loop."""

import json
import logging
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from csps.core.errors import ConfigError
from csps.core.plan import StepPlan, StepResult
from csps.sched.cost import shape_of
from csps.sched.layout import Decision

logger = logging.getLogger(__name__)


class StepLog:
    """Appends to `path` while it is entered; ConfigError if it cannot be opened.

    Times in seconds, `ended` on the clock of time.time; bytes of all ranks by kind.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--step-log: {path}: {error.strerror}") from None
        self._rows: queue.SimpleQueue[dict[str, object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="step-log", daemon=True)

    def add(self, plan: StepPlan, results: Sequence[StepResult], decision: Decision) -> None:
        """Note a step that all ranks have finished."""
        sent: dict[str, int] = {}
        for result in results:
            for kind, num_bytes in result.stats.bytes_sent.items():
                sent[kind] = sent.get(kind, 0) + num_bytes
        self._rows.put(
            {
                "ended": time.time(),
                "lane": plan.lane.value,
                "step_id": plan.step_id,
                "layout": plan.layout.value,
                **shape_of(plan)._asdict(),
                "predicted_s": {k.value: v for k, v in decision.predicted_s.items()},
                "wall_s": [result.stats.wall_s for result in results],
                "compute_s": [result.stats.compute_s for result in results],
                "comm_s": [result.stats.comm_s for result in results],
                "exposed_comm_s": [result.stats.exposed_comm_s for result in results],
                "bytes_sent": sent,
            }
        )

    def _write(self) -> None:
        try:
            while (row := self._rows.get()) is not None:
                self._file.write(json.dumps(row) + "\n")
                if self._rows.empty():
                    self._file.flush()
        except OSError as error:  # serving goes on
            logger.error("--step-log: %s: %s; no more steps are logged", self._path, error.strerror)
            while self._rows.get() is not None:
                pass

    def __enter__(self) -> "StepLog":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._rows.put(None)
        self._thread.join()
        self._file.close()
