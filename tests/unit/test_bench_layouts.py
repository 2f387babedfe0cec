"""What the layouts bench makes of runs and step logs."""

from pathlib import Path

import pytest

from csps.bench.layouts import Run, in_turn, whole_batch_gaps_ms
from csps.bench.layouts_score import (
    Step,
    error_table,
    errors_of_chosen,
    errors_on_fixed,
    read_steps,
    size_table,
)
from csps.core.plan import Lane, Layout
from csps.records.rows import STEPS_FILE, StepRow, write_rows

ONE, TWO = (1, 1, 0, 65), (2, 2, 0, 130)
CHUNKS = (40, 3, 900, 64)


def step(
    layout: str,
    seconds: float,
    shape: tuple[int, int, int, int] = ONE,
    predicted_s: dict[str, float] | None = None,
    size: int = 1,
) -> Step:
    return Step(size, layout, shape, predicted_s or {}, seconds)


def test_gaps_of_the_whole_batch_only() -> None:
    # The second stream begins at 2 and the first ends at 4.
    gaps = whole_batch_gaps_ms([[0, 1, 2, 3, 4], [2, 3.5, 4, 9]])
    assert gaps == [1000.0, 1000.0, 1500.0, 500.0]
    assert whole_batch_gaps_ms([[0, 1], [2, 3]]) == []


def test_each_server_is_first_in_its_turn() -> None:
    orders = [in_turn(number) for number in range(4)]
    assert {order[0] for order in orders[:3]} == {"sp", "tp", "model"}
    assert all(sorted(order) == ["model", "sp", "tp"] for order in orders)
    assert orders[3] == orders[0]


def test_steps_belong_to_the_run_they_ended_in(tmp_path: Path) -> None:
    rows = [
        StepRow(
            Lane.MIXED, 0, ended - 0.1, ended, Layout.TP,
            num_tokens=2, num_sequences=2, num_pairs=0, num_keys=130,
            wall_s=(0.05, 0.08), compute_s=(0.0, 0.0), comm_s=(0.0, 0.0), exposed_comm_s=(0.0, 0.0),
            predicted_s={Layout.SP: 0.2, Layout.TP: 0.1},
        )
        for ended in (9.0, 11.0, 15.0, 21.0)
    ]  # fmt: skip
    write_rows(tmp_path / STEPS_FILE, rows)
    runs = [Run("model", 2, 0, 10.0, 12.0, []), Run("model", 4, 0, 20.0, 22.0, [])]
    first, second = read_steps(tmp_path, runs)
    assert first == Step(2, "tp", TWO, {"sp": 0.2, "tp": 0.1}, 0.08)
    assert second.size == 4
    assert first.is_whole_batch
    assert second.is_decode
    assert not second.is_whole_batch
    assert read_steps(tmp_path / "none", runs) == []


def test_errors_of_the_layout_that_was_chosen() -> None:
    predicted_s = {"sp": 0.2, "tp": 0.1}
    steps = [
        step("tp", 0.125, ONE, predicted_s),
        step("tp", 0.08, TWO, predicted_s, size=2),
        step("tp", 0.1, TWO, predicted_s, size=2),
        step("sp", 0.25, CHUNKS, predicted_s, size=2),
    ]
    table = {(row["layout"], row["steps of"]): row for row in error_table(errors_of_chosen(steps))}
    assert {*table} == {
        ("sp", "all"), ("sp", "with prefill"),
        ("tp", "all"), ("tp", "decode"), ("tp", "decode 1"), ("tp", "decode 2"),
    }  # fmt: skip
    tp = table["tp", "decode"]
    assert tp["steps"] == 3
    assert tp["median"] == pytest.approx(0.2)
    assert tp["p90"] == pytest.approx(0.25)
    assert tp["signed median"] == pytest.approx(0.0)
    assert table["tp", "decode 1"]["signed median"] == pytest.approx(-0.2)
    assert table["sp", "with prefill"]["median"] == pytest.approx(0.2)


def test_errors_of_layouts_that_were_not_chosen() -> None:
    steps = [step("tp", 0.1, ONE, {"sp": 0.3, "tp": 0.1})]
    fixed = [step("sp", 0.2, ONE), step("tp", 0.2, ONE), step("sp", 0.2, TWO)]
    found = errors_on_fixed(steps, fixed)
    assert [(error.layout, error.relative) for error in found] == [
        ("sp", pytest.approx(0.5)),
        ("tp", pytest.approx(-0.5)),
    ]


def test_the_model_beside_the_better_layout() -> None:
    def run(variant: str, size: int, round_: int, *gaps_ms: float) -> Run:
        return Run(variant, size, round_, 0.0, 0.0, list(gaps_ms))

    runs = [
        run("sp", 1, 0, 30.0), run("tp", 1, 0, 20.0, 20.0), run("model", 1, 0, 21.0),
        run("sp", 1, 1, 30.0), run("tp", 1, 1, 40.0), run("model", 1, 1, 22.0, 23.0),
        run("sp", 2, 0, 10.0), run("tp", 2, 0, 10.0),  # ended here
    ]  # fmt: skip
    steps = {
        "sp": [step("sp", 0.03)],
        "tp": [step("tp", 0.02), step("tp", 9.0, CHUNKS)],
        "model": [step("tp", 0.018), step("sp", 0.018), step("tp", 0.018), step("tp", 9.0, TWO)],
    }
    (row,) = size_table(runs, steps)
    assert row["size"] == 1
    assert row["tbt_ms_p50"] == {"sp": 30.0, "tp": 20.0, "model": 22.0}
    assert row["ratio"] == pytest.approx(1.1)
    assert row["step_ms_p50"] == pytest.approx({"sp": 30.0, "tp": 20.0, "model": 18.0})
    assert row["step_ratio"] == pytest.approx(0.9)
    assert row["chosen"] == {"tp": 2, "sp": 1}
    assert row["tbt_ms_p50_by_round"] == {
        "sp": [30.0, 30.0], "tp": [20.0, 40.0], "model": [21.0, 22.0]
    }  # fmt: skip
