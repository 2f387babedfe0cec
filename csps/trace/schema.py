"""The one schema of traces: JSON lines, the first of which describes the others.

    {"csps_trace": 1, "name": "...", "source": "...", "block_tokens": 512}
    {"arrival_s": 0.0, "prompt_tokens": 700, "output_tokens": 20, "blocks": [0, 1]}

`blocks` has one id per started block of `block_tokens` prompt tokens. An id names the block
with everything before it, so prompts share exactly their common leading ids. `session` and
`turn` are optional: which conversation a request belongs to, and which of its turns it is.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from csps.core.errors import ConfigError

VERSION = 1


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. `arrival_s`: seconds since the trace began."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    session: int
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival. `source`: where they come from, for whoever reads on."""

    name: str
    source: str
    block_tokens: int
    requests: tuple[TraceRequest, ...]


class BadRow(NamedTuple):
    """A line (counted from 1) that is no request, and why."""

    line: int
    problem: str


def write_trace(path: Path, trace: Trace) -> None:
    """Write `trace`; the same trace gives the same bytes. ConfigError if it cannot be written."""
    header = {
        "csps_trace": VERSION,
        "name": trace.name,
        "source": trace.source,
        "block_tokens": trace.block_tokens,
    }
    rows = (
        {
            "arrival_s": request.arrival_s,
            "prompt_tokens": request.prompt_tokens,
            "output_tokens": request.output_tokens,
            "blocks": request.blocks,
            "session": request.session,
            "turn": request.turn,
        }
        for request in trace.requests
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for row in (header, *rows):
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def read_trace(path: Path, skip_bad: bool = False) -> tuple[Trace, list[BadRow]]:
    """A trace, and the rows of it that were left out.

    ConfigError, with the line, for a bad header; for the first bad row unless `skip_bad`; and
    if no row is left. Requests are put in order of arrival.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    name, source, block_tokens = _header(path, lines[0])
    requests: list[TraceRequest] = []
    bad: list[BadRow] = []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        try:
            requests.append(_request(line, block_tokens, session=number - 2))
        except ValueError as error:
            bad.append(BadRow(number, str(error)))
            if not skip_bad:
                raise ConfigError(bad_rows_text(path, bad)) from None
    if not requests:
        raise ConfigError(f"{path}: has no requests")
    requests.sort(key=lambda request: request.arrival_s)
    return Trace(name, source, block_tokens, tuple(requests)), bad


def bad_rows_text(path: Path, bad: Iterable[BadRow]) -> str:
    """What a user is told of bad rows: one line each."""
    return "\n".join(f"{path}: line {row.line}: {row.problem}" for row in bad)


def _header(path: Path, line: bytes) -> tuple[str, str, int]:
    try:
        fields = _object(line)
        if "csps_trace" not in fields:
            raise ValueError("is no header with csps_trace; csps trace convert reads other formats")
        if fields["csps_trace"] != VERSION:
            raise ValueError(f"csps_trace: expected {VERSION}, got {fields['csps_trace']!r}")
        block_tokens = _integer(fields, "block_tokens", 1)
    except ValueError as error:
        raise ConfigError(f"{path}: line 1: {error}") from None
    return str(fields.get("name", path.stem)), str(fields.get("source", "")), block_tokens


def _request(line: bytes, block_tokens: int, session: int) -> TraceRequest:
    fields = _object(line)
    arrival_s = fields.get("arrival_s")
    if (
        not isinstance(arrival_s, int | float)
        or isinstance(arrival_s, bool)
        or not 0 <= arrival_s < float("inf")  # NaN fails too
    ):
        raise ValueError(f"arrival_s: expected seconds, at least 0, got {arrival_s!r}")
    prompt_tokens = _integer(fields, "prompt_tokens", 1)
    blocks = fields.get("blocks")
    if not isinstance(blocks, list) or not all(type(b) is int and b >= 0 for b in blocks):
        raise ValueError("blocks: expected a list of ids, at least 0")
    wanted = -(-prompt_tokens // block_tokens)
    if len(blocks) != wanted:
        raise ValueError(
            f"blocks: {prompt_tokens} tokens in blocks of {block_tokens} take {wanted} ids, "
            f"got {len(blocks)}"
        )
    return TraceRequest(
        arrival_s=float(arrival_s),
        prompt_tokens=prompt_tokens,
        output_tokens=_integer(fields, "output_tokens", 1),
        blocks=tuple(blocks),
        session=_integer(fields, "session", 0) if "session" in fields else session,
        turn=_integer(fields, "turn", 0) if "turn" in fields else 0,
    )


def _object(line: bytes) -> dict[str, object]:
    try:
        fields = json.loads(line)
    except ValueError as error:  # JSON and UTF-8 alike
        raise ValueError(f"is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {type(fields).__name__}")
    return fields


def _integer(fields: dict[str, object], name: str, least: int) -> int:
    value = fields.get(name)
    if type(value) is not int or value < least:
        raise ValueError(f"{name}: expected an integer, at least {least}, got {value!r}")
    return value
