"""What the layouts bench makes of runs and step logs."""

from pathlib import Path

import pytest

from csps.bench.layouts import Run
from csps.bench.layouts_score import Step, error_table, read_steps, size_table
from csps.core.plan import Lane, Layout
from csps.records.rows import STEPS_FILE, StepRow, write_rows

ONE, TWO = (1, 1, 0, 65), (2, 2, 0, 130)
CHUNKS = (40, 3, 900, 64)
PREDICTED = {"sp": 0.2, "tp": 0.1}


def step(
    layout: str,
    seconds: float,
    shape: tuple[int, int, int, int] = ONE,
    predicted_s: dict[str, float] = PREDICTED,
    size: int = 1,
    round_: int = 0,
) -> Step:
    return Step(size, round_, layout, shape, predicted_s, seconds)


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
    runs = [Run(2, 0, 10.0, 12.0), Run(4, 1, 20.0, 22.0)]
    first, second = read_steps(tmp_path, runs)
    assert first == Step(2, 0, "tp", TWO, PREDICTED, 0.08)
    assert (second.size, second.round) == (4, 1)
    assert first.is_whole_batch
    assert first.chosen == "tp"
    assert first.error == pytest.approx(0.25)
    assert second.is_decode
    assert not second.is_whole_batch
    assert read_steps(tmp_path / "none", runs) == []


def test_errors_of_prediction_by_layout() -> None:
    steps = [
        step("tp", 0.125),
        step("tp", 0.08, TWO, size=2),
        step("tp", 0.1, TWO, size=2),
        step("sp", 0.25, CHUNKS, size=2),
    ]
    table = {(row["layout"], row["steps of"]): row for row in error_table(steps)}
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


def test_what_the_choice_costs() -> None:
    likes_sp = {"sp": 0.1, "tp": 0.2}
    steps = [
        step("sp", 9.0, CHUNKS),
        # A machine that gets slower: neighbours still say 1.5.
        step("sp", 0.3),
        step("tp", 0.2),
        step("sp", 0.3),
        step("tp", 0.4, predicted_s=likes_sp, round_=1),  # no neighbour of the step before
        step("sp", 0.6, predicted_s=likes_sp, round_=1),
        step("sp", 0.9, TWO, size=1),  # too many sequences
        step("sp", 0.7, TWO, size=2),  # alone
    ]
    (row,) = size_table(steps)
    assert row["size"] == 1
    assert row["pairs"] == 3
    assert row["sp_over_tp"] == pytest.approx({"low": 1.5, "p50": 1.5, "high": 1.5})
    assert row["step_ms_p50"] == pytest.approx({"sp": 300.0, "tp": 200.0})
    assert row["chosen"] == {"tp": 3, "sp": 2}
    assert row["over_better"] == pytest.approx((3 + 2 * 1.5) / 5)


def test_the_interval_holds_the_median() -> None:
    ratios = [0.8, 0.85, 0.9, 0.9, 0.95, 1.3]
    steps = []
    for round_, ratio in enumerate(ratios):
        steps += [step("tp", 1.0, round_=round_), step("sp", ratio, round_=round_)]
    (row,) = size_table(steps)
    found = row["sp_over_tp"]
    assert isinstance(found, dict)
    assert found["p50"] == pytest.approx(0.9)
    assert 0.8 <= found["low"] < 0.9 < found["high"] <= 1.3
    assert row["over_better"] == pytest.approx(1 / 0.9)
