"""Rows of a run's records: one per request, one per step. JSON lines, in the order of ending.

A run is a folder: csps.records.run says what was run, requests.jsonl and steps.jsonl hold rows.
Times are seconds since the run began unless a name says otherwise.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from csps.core.errors import ConfigError
from csps.core.plan import Lane, Layout

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
    replica: int = 0  # that took the step; each counts its own step_id and ranks


def to_json(row: RequestRow | StepRow) -> str:
    """One line without its end. Times keep microseconds: clocks and models know no more."""
    columns = _COLUMNS[type(row)]
    return "{" + ",".join([key + write(getattr(row, name)) for name, key, write in columns]) + "}"


def write_rows(path: Path, rows: Iterable[RequestRow | StepRow]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(to_json(row) + "\n" for row in rows)


def read_requests(folder: Path) -> list[RequestRow]:
    """The requests of a run. ConfigError with the line of a bad row."""
    return list(_read(folder / REQUESTS_FILE, RequestRow))


def iter_steps(folder: Path) -> Iterator[StepRow]:
    """The steps of a run one by one, none if it has no record of them. ConfigError as above."""
    path = folder / STEPS_FILE
    return _read(path, StepRow) if path.exists() else iter(())


def read_steps(folder: Path) -> list[StepRow]:
    """`iter_steps` at once; a long run on many ranks takes gigabytes."""
    return list(iter_steps(folder))


_quoted = cache(json.dumps)  # of the few names there are


def _read(path: Path, kind: type[Row]) -> Iterator[Row]:
    converters = _CONVERTERS[kind]
    decode = json.JSONDecoder(parse_constant=_refuse).decode
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield kind(**_values(decode(line.decode()), converters))
                except (ValueError, TypeError) as error:
                    raise ConfigError(f"{path}: line {number}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _values(given: Any, converters: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """Of the columns that are known. ValueError names the one that is wrong."""
    if not isinstance(given, dict):
        raise ValueError("expected an object")
    values: dict[str, Any] = {}
    name = ""
    try:
        for name, convert in converters.items():
            if name in given:
                values[name] = convert(given[name])
        by_rank = [len(values[name]) for name in ("wall_s", *_BY_RANK) if name in values]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if len({*by_rank}) > 1:
        raise ValueError(f"wall_s, {', '.join(_BY_RANK)}: expected one value of each rank")
    return values


def _json_float(value: float | None) -> str:
    if value is None:
        return "null"
    if not math.isfinite(value):
        raise ValueError(f"{value} cannot be written as JSON")
    return repr(round(value, 6))


def _json_int(value: int | None) -> str:
    return "null" if value is None else str(value)


def _json_ints(values: tuple[int, ...]) -> str:
    return "[" + ",".join(map(str, values)) + "]"


def _json_floats(form: str) -> Callable[[tuple[float, ...]], str]:
    return lambda values: "[" + ",".join([form] * len(values)) % values + "]"


def _json_map(values: Mapping[str, float]) -> str:
    return "{" + ",".join([f"{_quoted(k)}:{_json_float(v)}" for k, v in values.items()]) + "}"


def _writer(name: str, kind: Any) -> Callable[[Any], str]:
    """What writes a column's value."""
    if kind == tuple[float, ...]:
        return _json_floats("%.3f" if name.endswith("_ms") else "%.6f")
    return _WRITERS.get(kind, json.dumps)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _number(value: Any) -> float:
    if value.__class__ is not float and value.__class__ is not int:
        raise ValueError(f"expected a number, got {value!r}")
    return value


def _integer(value: Any) -> int:
    if value.__class__ is not int:
        raise ValueError(f"expected an integer, got {value!r}")
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {value!r}")
    return value


def _optional(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else convert(value)


def _tuple_of(*kinds: type) -> Callable[[Any], tuple[Any, ...]]:
    def convert(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not {*map(type, value)} <= {*kinds}:
            raise ValueError(f"expected a list of {kinds[0].__name__}, got {value!r:.80}")
        return tuple(value)

    return convert


def _map_of(*kinds: type) -> Callable[[Any], dict[str, Any]]:
    def convert(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not {*map(type, value.values())} <= {*kinds}:
            raise ValueError(f"expected an object of {kinds[0].__name__}, got {value!r:.80}")
        return value

    return convert


_BY_RANK = ("compute_s", "comm_s", "exposed_comm_s")
_BY_TYPE: dict[Any, Callable[[Any], Any]] = {
    int: _integer,
    float: _number,
    str: _string,
    Status: Status,
    Lane: Lane,
    Layout: Layout,
    int | None: _optional(_integer),
    float | None: _optional(_number),
    str | None: _optional(_string),
    tuple[float, ...]: _tuple_of(float, int),
    tuple[int, ...]: _tuple_of(int),
    Mapping[str, int]: _map_of(int),
    Mapping[Layout, float]: _map_of(float, int),
}
# Each step of a simulated run is written by these; json.dumps, made anew for each row, would take
# a tenth of the run.
_WRITERS: dict[Any, Callable[[Any], str]] = {
    int: _json_int,
    int | None: _json_int,
    float: _json_float,
    float | None: _json_float,
    Status: _quoted,
    Lane: _quoted,
    Layout: _quoted,
    tuple[int, ...]: _json_ints,
    Mapping[str, int]: _json_map,
    Mapping[Layout, float]: _json_map,
}
_COLUMNS = {
    kind: [(item.name, f'"{item.name}":', _writer(item.name, item.type)) for item in fields(kind)]
    for kind in (RequestRow, StepRow)
}
_CONVERTERS: dict[Any, dict[str, Callable[[Any], Any]]] = {
    kind: {item.name: _BY_TYPE[item.type] for item in fields(kind)}
    for kind in (RequestRow, StepRow)
}
