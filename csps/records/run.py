"""run.json: what a run was."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from csps.core.errors import ConfigError

RUN_FILE = "run.json"

_NUMBERS = {
    "ranks", "replicas", "num_requests", "speed", "elapsed_s", "block_size", "pages_per_rank",
    "skipped_rows",
}  # fmt: skip
_TEXTS = {"name", "strategy", "model", "trace", "trace_source"}


class RunKind(StrEnum):
    """Where a run's times come from."""

    LIVE = "live"  # clocks
    SIMULATED = "simulated"  # a model of costs


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What was run.

    `ranks` of one replica; `replicas`: servers side by side that share the requests. `cluster`:
    the cluster file's name, None where the machine was not described by one. `num_requests`,
    `speed`: of the trace as it was played, `speed` as a factor on its clock. `elapsed_s`: from
    the run's begin to its end. `pages_per_rank`: KV pages of `block_size` tokens that a rank has.
    `settings`: other flags that matter. `slo_*`: None: no such objective. `skipped_rows`: bad
    rows of the trace. The last four are csps.records.provenance's; they are left out of the file
    where they are None, as in simulated runs, of which the same seed gives the same bytes.
    """

    name: str
    kind: RunKind
    strategy: str
    model: str
    ranks: int
    trace: str
    num_requests: int
    elapsed_s: float
    block_size: int
    pages_per_rank: int
    cluster: str | None = None
    replicas: int = 1
    trace_source: str = ""
    speed: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    slo_ttft_s: float | None = None
    slo_tbt_ms: float | None = None
    interrupted: bool = False
    skipped_rows: int = 0
    command: str | None = None
    commit: str | None = None
    date: str | None = None
    machine: Mapping[str, Any] | None = None

    @property
    def simulated(self) -> bool:
        return self.kind is RunKind.SIMULATED

    def to_json(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("command", "commit", "date", "machine"):
            if values[name] is None:
                del values[name]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunInfo":
        """ValueError names a key that is missing or wrong; keys it does not know are left out."""
        known = {item.name: values[item.name] for item in fields(cls) if item.name in values}
        for name in sorted(_NUMBERS & known.keys()):
            if not isinstance(known[name], int | float) or isinstance(known[name], bool):
                raise ValueError(f"{name}: expected a number, got {known[name]!r}")
        for name in sorted(_TEXTS & known.keys()):
            if not isinstance(known[name], str):
                raise ValueError(f"{name}: expected text, got {known[name]!r}")
        try:
            known["kind"] = RunKind(known["kind"])
            return cls(**known)
        except KeyError as error:
            raise ValueError(f"{error.args[0]}: is missing") from None
        except TypeError as error:  # Python's own words name what is missing
            raise ValueError(str(error)) from None


def write_run(folder: Path, run: RunInfo) -> None:
    """Write run.json. The same run gives the same bytes."""
    (folder / RUN_FILE).write_text(json.dumps(run.to_json(), indent=1) + "\n", encoding="utf-8")


def read_run(folder: Path) -> RunInfo:
    """ConfigError if `folder` holds no run."""
    path = folder / RUN_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("expected an object")
        return RunInfo.from_json(values)
    except OSError as error:
        raise ConfigError(f"{folder}: is no run: {RUN_FILE}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
