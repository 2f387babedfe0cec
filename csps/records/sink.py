"""Writes rows to a file in a thread of its own, so that whoever measures never waits for a disk."""

import queue
import threading
from pathlib import Path
from types import TracebackType

from csps.core.errors import ConfigError
from csps.records.rows import RequestRow, StepRow, to_json


class Sink:
    """Writes to `path` while it is entered; leaving it waits until all is written.

    ConfigError if the file cannot be made, or (when leaving) if the disk did not take all.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        self._rows: queue.SimpleQueue[RequestRow | StepRow | None] = queue.SimpleQueue()
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._write, name=path.name, daemon=True)

    def add(self, row: RequestRow | StepRow) -> None:
        self._rows.put(row)

    def _write(self) -> None:
        while (row := self._rows.get()) is not None:
            if self._failure is not None:
                continue
            try:
                self._file.write(to_json(row) + "\n")
                if self._rows.empty():
                    self._file.flush()
            except OSError as error:
                self._failure = error

    def __enter__(self) -> "Sink":
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
        try:
            self._file.close()
        except OSError as failure:
            self._failure = self._failure or failure
        if self._failure is not None and error is None:
            raise ConfigError(f"{self._path}: {self._failure.strerror}")
