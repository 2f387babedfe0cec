"""Traces of other makers, read into the one schema. What each looks like: traces/README.md."""

from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from itertools import count, islice
from pathlib import Path
from random import Random

from csps.core.errors import ConfigError
from csps.trace.arrivals import Arrivals, arrival_times
from csps.trace.foreign import (
    AZURE_COLUMNS,
    LENGTHS_COLUMNS,
    Row,
    columns_of,
    parse_azure,
    parse_lengths,
    parse_mooncake,
)
from csps.trace.schema import BadRow, Trace, TraceRequest, bad_rows_text, read_trace
from csps.trace.sessions import derive_sessions


class Format(StrEnum):
    AUTO = "auto"
    CSPS = "csps"
    MOONCAKE = "mooncake"
    AZURE = "azure"
    LENGTHS = "lengths"  # CSV of Sarathi-Serve and Vidur


def read_any(
    path: Path,
    format: Format = Format.AUTO,
    rate: float | None = None,
    seed: int = 0,
    block_tokens: int = 512,
    skip_bad: bool = False,
) -> tuple[Trace, list[BadRow]]:
    """A trace of any format, and the rows of it that were left out.

    `rate` (requests per second) and `seed`: Poisson arrivals for lengths without times, and for
    nothing else. `block_tokens`: of Mooncake's ids, or of those given to prompts that share
    nothing; a trace of csps says its own. ConfigError, with the line, for an unknown format; for
    the first bad row unless `skip_bad`; and if no row is left.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if format is Format.AUTO:
        format = _detect(path, lines[0])
    if format is Format.CSPS:
        _refuse_rate(path, rate)
        return read_trace(path, skip_bad)
    parse, first = _parser(path, format, lines[0], block_tokens)
    rows: list[Row] = []
    bad: list[BadRow] = []
    for number, line in enumerate(lines[first:], first + 1):
        if not line.strip():
            continue
        try:
            rows.append(parse(line))
        except ValueError as error:
            bad.append(BadRow(number, str(error)))
            if not skip_bad:
                raise ConfigError(bad_rows_text(path, bad)) from None
    if not rows:
        raise ConfigError(f"{path}: has no requests")
    if format is Format.LENGTHS and rows[0].arrival_us is None:
        rows = _with_arrivals(path, rows, rate, seed)
    else:
        _refuse_rate(path, rate)
    rows.sort(key=lambda row: row.arrival_us or 0)
    # Mooncake counts from its trace's start, of which a file may be a part.
    start_us = 0 if format is Format.MOONCAKE else rows[0].arrival_us or 0
    requests = _requests(rows, start_us, block_tokens)
    return Trace(path.stem, f"{path.name} ({format})", block_tokens, requests), bad


def _detect(path: Path, line: str) -> Format:
    if line.startswith("{"):
        return Format.CSPS if '"csps_trace"' in line else Format.MOONCAKE
    columns = set(columns_of(line))
    if columns.issuperset(AZURE_COLUMNS):
        return Format.AZURE
    if columns.issuperset(LENGTHS_COLUMNS):
        return Format.LENGTHS
    raise ConfigError(
        f"{path}: line 1: is no known trace: expected JSON lines, or a CSV with the columns "
        f"{', '.join(AZURE_COLUMNS)} or {', '.join(LENGTHS_COLUMNS)}"
    )


def _parser(
    path: Path, format: Format, line: str, block_tokens: int
) -> tuple[Callable[[str], Row], int]:
    """What reads a line, and the index of the first line that it reads."""
    if format is Format.MOONCAKE:
        return partial(parse_mooncake, block_tokens=block_tokens), 0
    header = columns_of(line)
    azure = format is Format.AZURE
    missing = [name for name in (AZURE_COLUMNS if azure else LENGTHS_COLUMNS) if name not in header]
    if missing:
        raise ConfigError(f"{path}: line 1: has no column {', '.join(missing)}")
    return (parse_azure if azure else parse_lengths)(header), 1


def _refuse_rate(path: Path, rate: float | None) -> None:
    if rate is not None:
        raise ConfigError(f"--rate: {path} has arrival times; csps trace scale --speed shifts them")


def _with_arrivals(path: Path, rows: Sequence[Row], rate: float | None, seed: int) -> list[Row]:
    if rate is None:
        raise ConfigError(
            f"--rate: {path} has no arrival times (no column arrived_at); "
            "csps trace convert --rate R makes Poisson arrivals"
        )
    if not 0 < rate < float("inf"):
        raise ConfigError(f"--rate: expected requests per second, above 0, got {rate}")
    times = islice(arrival_times(Arrivals(), rate, Random(seed)), len(rows))
    return [
        row._replace(arrival_us=round(time * 1e6)) for row, time in zip(rows, times, strict=True)
    ]


def _requests(rows: Sequence[Row], start_us: int, block_tokens: int) -> tuple[TraceRequest, ...]:
    """Rows in order of arrival -> requests. Prompts without ids share nothing."""
    fresh = count()
    blocks = [
        tuple(islice(fresh, -(-row.prompt_tokens // block_tokens)))
        if row.blocks is None
        else row.blocks
        for row in rows
    ]
    places = derive_sessions(blocks) if any(row.session is None for row in rows) else _given(rows)
    return tuple(
        TraceRequest(
            arrival_s=((row.arrival_us or 0) - start_us) / 1e6,
            prompt_tokens=row.prompt_tokens,
            output_tokens=row.output_tokens,
            blocks=ids,
            session=session,
            turn=turn,
        )
        for row, ids, (session, turn) in zip(rows, blocks, places, strict=True)
    )


def _given(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Sessions as given; turns too, or else counted from 1."""
    seen: Counter[int] = Counter()
    places = []
    for row in rows:
        session = row.session or 0
        seen[session] += 1
        places.append((session, seen[session] if row.turn is None else row.turn))
    return places
