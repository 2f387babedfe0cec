"""Traces of other makers: what they say arrives, and what they say wrongly is named by line."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csps.core.errors import ConfigError
from csps.trace.formats import Format, read_any
from csps.trace.schema import BadRow, Trace, write_trace
from csps.trace.sessions import SYSTEM_PROMPT_REQUESTS, derive_sessions
from csps.trace.stats import trace_stats
from tests.unit.traces import AT_ANY_SPEED, traces

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10\r
2023-11-16 18:17:04.0319600,513,8\r
2023-11-17 00:00:00,1,27\r
"""


def mooncake(trace: Trace, *names: str) -> str:
    """`trace` as Mooncake writes it; `names`: of those fields that were added to its format."""
    lines = []
    for request in trace.requests:
        row = {
            "timestamp": request.arrival_s * 1000,
            "input_length": request.prompt_tokens,
            "output_length": request.output_tokens,
            "hash_ids": request.blocks,
            "session": request.session,
            "turn": request.turn,
        }
        lines.append({k: v for k, v in row.items() if "_" in k or k == "timestamp" or k in names})
    return "".join(json.dumps(line) + "\n" for line in lines)


def row(**changes: object) -> str:
    fields = {"timestamp": 5, "input_length": 700, "output_length": 3, "hash_ids": [0, 1]}
    return json.dumps(fields | changes)


def file_of(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


@AT_ANY_SPEED
@given(traces())
def test_mooncake_comes_back(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    path = file_of(tmp_path_factory.mktemp("t"), mooncake(trace, "session", "turn"))
    read, bad = read_any(path, block_tokens=trace.block_tokens)
    assert read.requests == trace.requests
    assert read.block_tokens == trace.block_tokens
    assert not bad


def test_turns_are_counted_where_only_sessions_are_named(tmp_path: Path) -> None:
    lines = [row(timestamp=t, session=s) for t, s in ((3000, 7), (1000, 7), (2000, 9))]
    read, _ = read_any(file_of(tmp_path, "\n".join(lines)))
    assert [(r.arrival_s, r.session, r.turn) for r in read.requests] == [
        (1.0, 7, 1),
        (2.0, 9, 1),
        (3.0, 7, 2),
    ]


def test_sessions_are_read_off_shared_blocks(tmp_path: Path) -> None:
    ids = [[0, 1], [5, 6], [0, 2, 3], [5, 6], [0, 2, 4, 8], [0, 9], [7]]
    lines = [
        row(timestamp=i, input_length=512 * len(blocks), hash_ids=blocks)
        for i, blocks in enumerate(ids)
    ]
    read, _ = read_any(file_of(tmp_path, "\n".join(lines)))
    places = [(r.session, r.turn) for r in read.requests]
    assert places == [(0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (0, 4), (6, 1)]


@AT_ANY_SPEED
@given(st.integers(1, 3), st.integers(1, 3))
def test_a_system_prompt_is_no_session(num_system: int, turns: int) -> None:
    """Every session is a chain of growing prompts behind the same leading ids."""
    system = list(range(num_system))
    blocks, wanted = [], []
    for session in range(2 * SYSTEM_PROMPT_REQUESTS):
        first = len(blocks)
        for turn in range(turns):
            blocks.append([*system, *(1000 + 10 * session + i for i in range(turn + 1))])
            wanted.append((first, turn + 1))
    assert derive_sessions(blocks) == wanted


def test_azure_counts_from_its_first_request_and_shares_nothing(tmp_path: Path) -> None:
    read, bad = read_any(file_of(tmp_path, AZURE))
    assert not bad
    assert [r.arrival_s for r in read.requests] == [0.0, 0.052, 20576.02004]
    assert [(r.prompt_tokens, r.output_tokens) for r in read.requests] == [
        (4808, 10),
        (513, 8),
        (1, 27),
    ]
    assert [len(r.blocks) for r in read.requests] == [10, 2, 1]
    assert trace_stats(read).prefix_hit == 0
    assert len({r.session for r in read.requests}) == 3
    zone = AZURE.replace("00:00:00,", "01:00:00.000000+01:00,")
    assert read_any(file_of(tmp_path, zone))[0].requests == read.requests


def test_lengths_take_their_own_times_or_poisson_ones(tmp_path: Path) -> None:
    timed = "arrived_at,num_prefill_tokens,num_decode_tokens\n10.5,700,20\n10.0,1.0,2\n"
    read, _ = read_any(file_of(tmp_path, timed))
    assert [(r.arrival_s, r.prompt_tokens) for r in read.requests] == [(0.0, 1), (0.5, 700)]
    path = file_of(
        tmp_path, "num_prefill_tokens,num_decode_tokens,pd_ratio\n" + "700,20,35\n" * 400
    )
    with pytest.raises(ConfigError, match=r"--rate: .* has no arrival times"):
        read_any(path)
    with pytest.raises(ConfigError, match="--rate: expected requests per second, above 0"):
        read_any(path, rate=0)
    read, _ = read_any(path, rate=2.0, seed=1)
    assert read == read_any(path, rate=2.0, seed=1)[0] != read_any(path, rate=2.0, seed=2)[0]
    assert trace_stats(read).rate == pytest.approx(2.0, rel=0.2)


def test_a_rate_for_what_has_times_is_refused(tmp_path: Path) -> None:
    for text in (AZURE, row(), "arrived_at,num_prefill_tokens,num_decode_tokens\n1,2,3\n"):
        with pytest.raises(ConfigError, match=r"--rate: .* has arrival times"):
            read_any(file_of(tmp_path, text), rate=1.0)


def test_the_format_is_told_from_the_content(tmp_path: Path) -> None:
    trace, _ = read_any(file_of(tmp_path, row()))
    own = tmp_path / "own.csv"
    write_trace(own, trace)
    assert read_any(own) == (trace, [])
    with pytest.raises(ConfigError, match="line 1: is no known trace"):
        read_any(file_of(tmp_path, "when,what\n1,2\n"))
    with pytest.raises(ConfigError, match="line 1: is no known trace"):
        read_any(file_of(tmp_path, ""))
    with pytest.raises(ConfigError, match="line 1: has no column TIMESTAMP, ContextTokens"):
        read_any(file_of(tmp_path, row()), Format.AZURE)
    with pytest.raises(ConfigError, match="no-such: No such file"):
        read_any(tmp_path / "no-such")


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (row()[:-9], "is no JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        (row(timestamp=-1), "timestamp: expected milliseconds"),
        (row(timestamp=float("nan")), "timestamp: expected milliseconds"),
        (row(timestamp=None), "timestamp: expected milliseconds"),
        (row(input_length=0, hash_ids=[]), "input_length: expected an integer, at least 1"),
        (row(output_length=0), "output_length: expected an integer, at least 1, got 0"),
        (row(output_length=2.5), "output_length: expected an integer"),
        (row(hash_ids=[0]), "hash_ids: 700 tokens in blocks of 512 take 2 ids, got 1"),
        (row(hash_ids=[0, -1]), "hash_ids: expected a list of ids"),
        (row(hash_ids="01"), "hash_ids: expected a list of ids"),
        (row(session="a"), "session: expected an integer"),
        (row(turn=-1), "turn: expected an integer"),
    ],
)
def test_bad_mooncake_rows_are_named_by_line(tmp_path: Path, bad: str, problem: str) -> None:
    path = file_of(tmp_path, f"{row()}\n\n{bad}\n{row(timestamp=9)}\n")
    with pytest.raises(ConfigError) as caught:
        read_any(path)
    assert str(caught.value).startswith(f"{path}: line 3: {problem}")
    read, skipped = read_any(path, skip_bad=True)
    assert len(read.requests) == 2
    assert [(row.line, row.problem.startswith(problem)) for row in skipped] == [(3, True)]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("2023-11-16 18:17:05,10", "expected 3 columns, got 2"),
        ("yesterday,10,10", "TIMESTAMP: expected a date and time, got 'yesterday'"),
        ("2023-11-16 18:17:05,0,10", "ContextTokens: expected an integer, at least 1, got '0'"),
        ("2023-11-16 18:17:05,9,-1", "GeneratedTokens: expected an integer, at least 1, got '-1'"),
        ("2023-11-16 18:17:05,nan,1", "ContextTokens: expected an integer, at least 1, got 'nan'"),
        ("2023-11-16 18:17:05,,1", "ContextTokens: expected a number, got ''"),
    ],
)
def test_bad_azure_rows_are_named_by_line(tmp_path: Path, bad: str, problem: str) -> None:
    path = file_of(tmp_path, AZURE + bad + "\n")
    with pytest.raises(ConfigError) as caught:
        read_any(path)
    assert str(caught.value) == f"{path}: line 5: {problem}"
    assert read_any(path, skip_bad=True)[1] == [BadRow(5, problem)]


def test_a_file_of_bad_rows_only_is_no_trace(tmp_path: Path) -> None:
    header = "num_prefill_tokens,num_decode_tokens,arrived_at\n"
    path = file_of(tmp_path, header + "1,1,inf\n1,0,1\n1.5,1,1\n")
    with pytest.raises(ConfigError, match="line 2: arrived_at: expected seconds, got 'inf'"):
        read_any(path)
    with pytest.raises(ConfigError, match="has no requests"):
        read_any(path, skip_bad=True)
