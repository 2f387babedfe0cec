"""Cases of a study are simulated once, and found again by everything that makes them differ."""

from dataclasses import replace
from pathlib import Path

import pytest

from csps.core.errors import ConfigError
from csps.core.strategy import Strategy
from csps.sim.run import simulate
from csps.sim.study import Cases, digest
from tests.unit.simulating import CLUSTER, MODEL, request, settings, trace

ASKED = trace([request(0.01 * i, 100 + i, 5, 1000 * i) for i in range(4)])
CONFIG = settings(Strategy.SARATHI, keep_steps=False)


def test_a_case_is_kept_and_found_again(tmp_path: Path) -> None:
    cases = Cases(tmp_path)
    found = cases.figures(ASKED, CLUSTER, MODEL, CONFIG)
    assert found == digest(simulate(ASKED, CLUSTER, MODEL, CONFIG).summary())
    [kept] = tmp_path.iterdir()
    kept.write_text('{"kept": 1}')
    assert Cases(tmp_path).figures(ASKED, CLUSTER, MODEL, CONFIG) == {"kept": 1}


def test_another_flag_trace_or_cluster_is_another_case(tmp_path: Path) -> None:
    cases = Cases(tmp_path)
    others = (
        (ASKED, CLUSTER, CONFIG),
        (ASKED, CLUSTER, replace(CONFIG, speed=2.0)),
        (replace(ASKED, requests=ASKED.requests[:2]), CLUSTER, CONFIG),
        (ASKED, replace(CLUSTER, step_s=1.0), CONFIG),
    )
    found = [cases.figures(asked, cluster, MODEL, config) for asked, cluster, config in others]
    assert len({str(figures) for figures in found}) == len(others)
    assert len(list(tmp_path.iterdir())) == len(others)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    cases = Cases(tmp_path)
    cases.figures(ASKED, CLUSTER, MODEL, CONFIG)
    [kept] = tmp_path.iterdir()
    kept.write_text("{")
    with pytest.raises(ConfigError, match=f"{kept.name}.*remove it"):
        cases.figures(ASKED, CLUSTER, MODEL, CONFIG)


def test_figures_have_five_digits() -> None:
    figures = digest(simulate(ASKED, CLUSTER, MODEL, CONFIG).summary())
    assert figures["done"] == figures["requests"] == len(ASKED.requests)
    assert all(
        float(f"{value:.5g}") == value for value in figures["ttft_s"].values() if value is not None
    )
