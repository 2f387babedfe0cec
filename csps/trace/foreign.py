"""One line of another maker's trace, read strictly."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
LENGTHS_COLUMNS = ("num_prefill_tokens", "num_decode_tokens")  # and arrived_at, if there are times


class Row(NamedTuple):
    """What a line says; None: nothing. `arrival_us`: microseconds, from any time on."""

    arrival_us: int | None
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] | None = None
    session: int | None = None
    turn: int | None = None


def parse_mooncake(line: str, block_tokens: int) -> Row:
    """ValueError if `line` is no request."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {type(fields).__name__}")
    time_ms = fields.get("timestamp")
    if (
        not isinstance(time_ms, int | float)
        or isinstance(time_ms, bool)
        or not 0 <= time_ms < float("inf")  # NaN fails too
    ):
        raise ValueError(f"timestamp: expected milliseconds, at least 0, got {time_ms!r}")
    prompt_tokens = _integer(fields, "input_length", 1)
    ids = fields.get("hash_ids")
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError("hash_ids: expected a list of ids, at least 0")
    wanted = -(-prompt_tokens // block_tokens)
    if len(ids) != wanted:
        raise ValueError(
            f"hash_ids: {prompt_tokens} tokens in blocks of {block_tokens} take {wanted} ids, "
            f"got {len(ids)}"
        )
    return Row(
        round(time_ms * 1000),
        prompt_tokens,
        _integer(fields, "output_length", 1),
        tuple(ids),
        _integer(fields, "session", 0) if fields.get("session") is not None else None,
        _integer(fields, "turn", 0) if fields.get("turn") is not None else None,
    )


def columns_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.split(",")]


def parse_azure(header: Sequence[str]) -> Callable[[str], Row]:
    """Reads a line below `header`; ValueError if it is no request."""

    def parse(line: str) -> Row:
        cells = _cells(header, line)
        text = cells["TIMESTAMP"]
        try:
            time = datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(f"TIMESTAMP: expected a date and time, got {text!r}") from None
        since = (time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH
        return Row(
            since // timedelta(microseconds=1),
            _tokens(cells, "ContextTokens"),
            _tokens(cells, "GeneratedTokens"),
        )

    return parse


def parse_lengths(header: Sequence[str]) -> Callable[[str], Row]:
    """Reads a line below `header`; ValueError if it is no request."""

    def parse(line: str) -> Row:
        cells = _cells(header, line)
        arrival_us = None
        if "arrived_at" in cells:
            seconds = _number(cells, "arrived_at")
            if not abs(seconds) < float("inf"):
                raise ValueError(f"arrived_at: expected seconds, got {cells['arrived_at']!r}")
            arrival_us = round(seconds * 1e6)
        return Row(
            arrival_us,
            _tokens(cells, "num_prefill_tokens"),
            _tokens(cells, "num_decode_tokens"),
        )

    return parse


def _integer(fields: Mapping[str, object], name: str, least: int) -> int:
    value = fields.get(name)
    if type(value) is not int or value < least:
        raise ValueError(f"{name}: expected an integer, at least {least}, got {value!r}")
    return value


def _cells(header: Sequence[str], line: str) -> dict[str, str]:
    cells = columns_of(line)
    if len(cells) != len(header):
        raise ValueError(f"expected {len(header)} columns, got {len(cells)}")
    return dict(zip(header, cells, strict=True))


def _number(cells: Mapping[str, str], name: str) -> float:
    try:
        return float(cells[name])
    except ValueError:
        raise ValueError(f"{name}: expected a number, got {cells[name]!r}") from None


def _tokens(cells: Mapping[str, str], name: str) -> int:
    """Some writers make 700 into 700.0."""
    value = _number(cells, name)
    if not value.is_integer() or value < 1:  # inf and NaN are no integers
        raise ValueError(f"{name}: expected an integer, at least 1, got {cells[name]!r}")
    return int(value)
