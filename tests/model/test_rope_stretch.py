"""`--rope-scaling` makes of a model what the same scaling in its config.json would."""

from pathlib import Path

import pytest
import torch

from csps.checkpoint.config import read_config
from csps.checkpoint.locate import locate
from csps.core.errors import ConfigError
from csps.model.rope import inverse_frequencies
from tests.checkpoints import write_tiny


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("models") / "plain")


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_as_in_the_checkpoint(plain: Path, tmp_path: Path, kind: str) -> None:
    own = read_config(locate(str(plain)))
    stretched = read_config(locate(str(plain)), f"{kind}:4")
    assert stretched.max_position == 4 * own.max_position
    scaling = {
        "rope_type": kind,
        "factor": 4.0,
        "original_max_position_embeddings": own.max_position,
    }
    written = write_tiny(
        "llama",
        tmp_path / "scaled",
        # dynamic: Hugging Face takes the original length from here.
        max_position_embeddings=(1 if kind == "dynamic" else 4) * own.max_position,
        rope_parameters={"rope_theta": own.rope.theta, **scaling},
    )
    expected = read_config(locate(str(written)))
    length = stretched.max_position
    ours, factor = inverse_frequencies(stretched.rope, own.head_dim, length)
    theirs, their_factor = inverse_frequencies(expected.rope, own.head_dim, length)
    torch.testing.assert_close(ours, theirs)
    assert factor == pytest.approx(their_factor)
    unscaled, _ = inverse_frequencies(own.rope, own.head_dim, length)
    assert (ours < unscaled).any()


@pytest.mark.parametrize(
    "text", ["yarn", "yarn:", "yarn:x", "yarn:1", "yarn:nan", "llama3:8", ":2"]
)
def test_a_malformed_scaling_is_named(plain: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--rope-scaling: expected KIND:FACTOR"):
        read_config(locate(str(plain)), text)


def test_a_scaled_model_is_not_scaled_again(tmp_path: Path) -> None:
    scaled = write_tiny(
        "llama", tmp_path / "scaled", rope_scaling={"rope_type": "linear", "factor": 2.0}
    )
    with pytest.raises(ConfigError, match=r"^--rope-scaling: the model has its own, linear"):
        read_config(locate(str(scaled)), "yarn:2")
