"""The file of --step-log: a row per step."""

import logging
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from csps.core.errors import ConfigError
from csps.records.rows import StepRow, to_json

logger = logging.getLogger(__name__)


class StepLog:
    """Appends to `path` until it is left; ConfigError if it cannot be opened. Blocks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--step-log: {path}: {error.strerror}") from None

    def write(self, rows: Iterable[StepRow]) -> bool:
        """Whether it could be written; serving goes on if not."""
        try:
            self._file.writelines(to_json(row) + "\n" for row in rows)
            self._file.flush()
        except OSError as error:
            logger.error("--step-log: %s: %s; no more steps are logged", self._path, error.strerror)
            return False
        return True

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
