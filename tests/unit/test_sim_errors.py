"""What a user who is wrong is told."""

from pathlib import Path
from typing import Any

import pytest

from csps.core.attention import AttentionKind
from csps.core.errors import ConfigError
from csps.core.strategy import Strategy
from csps.sim.cluster import load_cluster
from csps.sim.model import WeightType, load_model
from csps.sim.run import simulate
from tests.unit.simulating import CLUSTER, MODEL, request, settings, trace


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"--cluster.*a100x32, a100x8, .*h200x8"):
        load_cluster("a100x9")
    with pytest.raises(ConfigError, match=r"--model.*llama-3\.1-70b"):
        load_model("llama-4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replicas": 3}, "--replicas: 3 do not divide the 8 GPUs"),
        ({"sp": 3}, "--sp, --tp: 3 x 1"),
        ({"attention": AttentionKind.CSA, "strategy": Strategy.SHIFT}, "--attention: csa needs"),
        ({"attention": AttentionKind.CSA_DISTANCE}, "--attention: its density"),
        ({"csa_gamma": 0.9}, r"--csa-gamma: density was measured at 0\.93, 0\.95, 0\.97"),
        ({"strategy": Strategy.SARATHI, "tp": 1}, "--tp: sarathi"),
        ({"speed": 0.0}, "--speed"),
    ],
)
def test_flags_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    strategy = changes.pop("strategy", Strategy.CSPS)
    with pytest.raises(ConfigError, match=message):
        simulate(trace([request(0, 10, 1, 0)]), CLUSTER, MODEL, settings(strategy, **changes))


def test_no_fp8_on_gpus_without_it() -> None:
    fp8 = load_model("smollm2-135m", WeightType.FP8)
    with pytest.raises(ConfigError, match="--weights: the GPUs of a100x8 have no fp8"):
        simulate(trace([request(0, 10, 1, 0)]), CLUSTER, fp8, settings(Strategy.RING))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_gpus = 8", "num_gpus = 0", "num_gpus: expected an integer, at least 1, got 0"),
        ("hbm = 0.80", "hbm = 1.5", r"efficiency\.hbm: must be in"),
        ("hbm = 0.80", "", r"efficiency\.hbm: expected a number, got None"),
        ("step_s = 3e-3", "step_s = 3e-3\nother = 1", r"overhead\.source\.other: expected text"),
        ("[gpu]", "[gpu", r"line 6"),
        ('kind = "analytic"', 'kind = "guess"', "kind: expected analytic or calibrated"),
    ],
)
def test_a_wrong_file_names_the_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    shipped = Path("csps/sim/clusters/a100x8.toml").read_text()
    assert old in shipped
    path = tmp_path / "mine.toml"
    path.write_text(shipped.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_cluster(path)
