"""Rows of a run's records: one per request, one per step. JSON lines, in the order of ending.

A run is a folder: run.json says what was run, requests.jsonl and steps.jsonl hold these rows.
Times are seconds since the run began unless a name says otherwise.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from csps.core.errors import ConfigError
from csps.core.plan import Lane, Layout

RUN_FILE = "run.json"
REQUESTS_FILE = "requests.jsonl"
STEPS_FILE = "steps.jsonl"
SUMMARY_FILE = "summary.json"

Row = TypeVar("Row", "RequestRow", "StepRow")


class Status(StrEnum):
    """How a request of a run ended."""

    DONE = "done"
    FAILED = "failed"  # with an error, a refusal included
    UNFINISHED = "unfinished"  # the run ended first


@dataclass(frozen=True, slots=True)
class RequestRow:
    """One request as its client saw it.

    `arrival_s`: when the trace wanted it sent, `sent_s` when it was. `queue_s` (until its first
    step), `ttft_s`, `response_s` and the first of `gaps_ms`, the milliseconds between its tokens,
    count from `sent_s`; None where that was not reached. `response_s` of a request that did not
    end well is how long it had been there. `density`, `union_density`, `recall_*` are of a sparse
    prefill, else None.
    """

    request_id: str
    arrival_s: float
    sent_s: float
    prompt_tokens: int
    wanted_tokens: int  # output the trace asks for
    output_tokens: int  # output that came
    status: Status
    response_s: float
    queue_s: float | None = None
    ttft_s: float | None = None
    gaps_ms: tuple[float, ...] = ()
    cached_tokens: int = 0
    session: int = 0
    turn: int = 0
    error: str | None = None
    density: float | None = None
    union_density: float | None = None
    recall_mean: float | None = None
    recall_min: float | None = None


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step that all ranks have finished.

    Shape: see csps.sched.cost.StepShape. `predicted_s` by layout, where a cost model chose. Lists
    are by rank, times as in csps.core.plan.StepStats. `bytes_sent`, of all ranks, by kind;
    `dense_bytes`: what `bytes_sent` would be with exact attention, None if that is not known.
    `kv_pages`: pages in use by rank (placement by heads: one number, the same on all), after it.
    """

    lane: Lane
    step_id: int
    started_s: float
    ended_s: float
    layout: Layout
    num_tokens: int
    num_sequences: int
    num_pairs: int
    num_keys: int
    wall_s: tuple[float, ...]
    compute_s: tuple[float, ...]
    comm_s: tuple[float, ...]
    exposed_comm_s: tuple[float, ...]
    bytes_sent: Mapping[str, int] = field(default_factory=dict)
    dense_bytes: int | None = None
    predicted_s: Mapping[Layout, float] = field(default_factory=dict)
    density: float | None = None
    recall: float | None = None
    kv_pages: tuple[int, ...] = ()


def to_json(row: RequestRow | StepRow) -> str:
    """One line without its end. Times keep microseconds: clocks and models know no more."""
    return json.dumps(_rounded(asdict(row)), separators=(",", ":"))


def write_rows(path: Path, rows: Iterable[RequestRow | StepRow]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(to_json(row) + "\n" for row in rows)


def read_requests(folder: Path) -> list[RequestRow]:
    """The requests of a run. ConfigError with the line of a bad row."""
    return list(_read(folder / REQUESTS_FILE, RequestRow, {"status": Status}))


def read_steps(folder: Path) -> list[StepRow]:
    """The steps of a run, none if it has no record of them. ConfigError as above."""
    path = folder / STEPS_FILE
    return list(_read(path, StepRow, {"lane": Lane, "layout": Layout})) if path.exists() else []


def read_run(folder: Path) -> dict[str, Any]:
    """run.json. ConfigError if `folder` is no run."""
    try:
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{folder}: is no run: {RUN_FILE}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{folder / RUN_FILE}: {error}") from None
    if not isinstance(run, dict):
        raise ConfigError(f"{folder / RUN_FILE}: expected an object")
    return run


def _read(path: Path, kind: type[Row], enums: Mapping[str, type[StrEnum]]) -> Iterator[Row]:
    known = {item.name for item in fields(kind)}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    values = {k: _frozen(v) for k, v in json.loads(line).items() if k in known}
                    for name, enum in enums.items():
                        values[name] = enum(values[name])
                    yield kind(**values)
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise ConfigError(f"{path}: line {number}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
