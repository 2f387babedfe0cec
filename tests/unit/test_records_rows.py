"""Rows written are rows read; what is no row is named with its line."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csps.core.errors import ConfigError
from csps.core.plan import Lane, Layout
from csps.records.provenance import provenance
from csps.records.rows import (
    REQUESTS_FILE,
    STEPS_FILE,
    RequestRow,
    Status,
    StepRow,
    read_requests,
    read_steps,
    to_json,
    write_rows,
)
from csps.records.run import RUN_FILE, RunInfo, RunKind, read_run, write_run
from tests.unit.record_rows import RUN, request, step, write_folder

counts = st.integers(0, 2**40)
seconds = st.integers(0, 10**12).map(lambda us: us / 1e6)  # microseconds are kept
shares = st.none() | st.integers(0, 10**6).map(lambda millionths: millionths / 1e6)
BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    int: counts,
    float: seconds,
    str: st.text(),
    Status: st.sampled_from(Status),
    Lane: st.sampled_from(Lane),
    Layout: st.sampled_from(Layout),
    int | None: st.none() | counts,
    float | None: shares,
    str | None: st.none() | st.text(),
    tuple[float, ...]: st.lists(st.integers(0, 10**9).map(lambda us: us / 1e3)).map(tuple),
    tuple[int, ...]: st.lists(counts).map(tuple),
}


unhurried = settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)  # fmt: skip


def columns(kind: type) -> dict[str, st.SearchStrategy[Any]]:
    return {item.name: BY_TYPE[item.type] for item in fields(kind) if item.type in BY_TYPE}


@st.composite
def steps(draw: st.DrawFn) -> StepRow:
    ranks = draw(st.integers(0, 4))
    of_ranks = st.lists(seconds, min_size=ranks, max_size=ranks).map(tuple)
    names = ("wall_s", "compute_s", "comm_s", "exposed_comm_s")
    others = columns(StepRow)
    others["bytes_sent"] = st.dictionaries(st.text(), counts)
    others["predicted_s"] = st.dictionaries(st.sampled_from(Layout), seconds)
    return draw(st.builds(StepRow, **{**others, **{name: of_ranks for name in names}}))


@unhurried
@given(rows=st.lists(st.builds(RequestRow, **columns(RequestRow)), max_size=2))
def test_requests_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[RequestRow]):
    folder = tmp_path_factory.mktemp("run")
    write_rows(folder / REQUESTS_FILE, rows)
    assert read_requests(folder) == rows


@unhurried
@given(rows=st.lists(steps(), max_size=2))
def test_steps_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[StepRow]):
    folder = tmp_path_factory.mktemp("run")
    write_rows(folder / STEPS_FILE, rows)
    assert read_steps(folder) == rows


def test_times_keep_microseconds():
    row = json.loads(to_json(request(sent_s=1.23456789, gaps_ms=(1.23456789, 2.0))))
    assert row["sent_s"] == 1.234568
    assert row["gaps_ms"] == [1.235, 2.0]


def test_a_run_without_steps_has_none(tmp_path: Path):
    assert read_steps(write_folder(tmp_path / "run", RUN, [request()])) == []


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("prompt_tokens", 1.5, "prompt_tokens: expected an integer"),
        ("prompt_tokens", True, "prompt_tokens: expected an integer"),
        ("response_s", "soon", "response_s: expected a number"),
        ("response_s", float("nan"), "NaN is no number"),
        ("status", "lost", "status: 'lost' is not a valid Status"),
        ("gaps_ms", [1.0, None], "gaps_ms: expected a list of float"),
        ("error", 3, "error: expected text"),
    ],
)
def test_a_bad_request_is_named_with_its_line(
    tmp_path: Path, column: str, value: Any, problem: str
):
    good = json.loads(to_json(request()))
    lines = [json.dumps(good), json.dumps({**good, column: value})]
    (tmp_path / REQUESTS_FILE).write_text("\n".join(lines))
    with pytest.raises(ConfigError) as caught:
        read_requests(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / REQUESTS_FILE}: line 2: {problem}")


def test_a_cut_off_row_and_a_missing_column_are_named_with_their_line(tmp_path: Path):
    lines = [to_json(request()), to_json(request())[:50]]
    (tmp_path / REQUESTS_FILE).write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="line 2"):
        read_requests(tmp_path)
    row = json.loads(lines[0])
    del row["status"]
    (tmp_path / REQUESTS_FILE).write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=r"line 1.*status"):
        read_requests(tmp_path)


def test_a_step_has_one_value_of_each_rank(tmp_path: Path):
    (tmp_path / STEPS_FILE).write_text(to_json(step(comm_s=(0.1,))))
    with pytest.raises(ConfigError, match=r"line 1: .*one value of each rank"):
        read_steps(tmp_path)


def test_columns_of_a_later_version_are_left_out(tmp_path: Path):
    row = {**json.loads(to_json(request())), "mood": "good"}
    (tmp_path / REQUESTS_FILE).write_text(json.dumps(row))
    assert read_requests(tmp_path) == [request()]


def test_a_run_comes_back_with_and_without_provenance(tmp_path: Path):
    live = replace(RUN, settings={"token_budget": 512}, slo_ttft_s=2.0, **provenance())
    for run in (live, replace(RUN, kind=RunKind.SIMULATED, cluster="a100x8")):
        write_run(tmp_path, run)
        assert read_run(tmp_path) == run
    assert "date" not in json.loads((tmp_path / RUN_FILE).read_text())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ranks": "two"}, "ranks: expected a number"),
        ({"kind": "dreamt"}, "'dreamt' is not a valid RunKind"),
        ({"model": None}, "model: expected text"),
    ],
)
def test_a_bad_run_is_named(tmp_path: Path, changes: dict[str, Any], problem: str):
    (tmp_path / RUN_FILE).write_text(json.dumps({**RUN.to_json(), **changes}))
    with pytest.raises(ConfigError, match=problem):
        read_run(tmp_path)


def test_a_folder_that_is_no_run_says_so(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"is no run: run\.json: No such file"):
        read_run(tmp_path)
    values = RUN.to_json()
    del values["kind"]
    with pytest.raises(ValueError, match="kind: is missing"):
        RunInfo.from_json(values)


@pytest.mark.parametrize("changes", [{"started_s": float("nan")}, {"predicted_s": {"sp": 1e400}}])
def test_what_is_no_number_is_not_written(changes: dict[str, Any]):
    with pytest.raises(ValueError, match="cannot be written"):
        to_json(step(**changes))
