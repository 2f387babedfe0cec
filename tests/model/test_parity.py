"""Logits against transformers on tiny checkpoints that transformers itself wrote."""

from itertools import pairwise

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from csps.checkpoint.config import read_config
from csps.checkpoint.locate import locate
from csps.core.model_config import RopeScaling
from csps.model.local_attention import LocalAttention
from tests.checkpoints import edit_json, write_gguf, write_tiny
from tests.model.reference import load, logits, random_tokens, transformers_logits

ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn_tuned": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "truncate": False,
    },
    "yarn_factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 256,
        "attention_factor": 1.3,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.std() > 0.5, "logits too small for the tolerance to mean anything"
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 6, "head_dim": 24}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
    ],
)
def test_families(tmp_path, kind, overrides):
    write_tiny(kind, tmp_path, **overrides)
    tokens = random_tokens(100)
    assert_same(logits(load(tmp_path), tokens), transformers_logits(tmp_path, tokens))


@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling(tmp_path, name):
    write_tiny("llama", tmp_path, rope_parameters={"rope_theta": 10_000.0, **ROPES[name]})
    tokens = random_tokens(400)
    assert_same(logits(load(tmp_path), tokens), transformers_logits(tmp_path, tokens))


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_old_rope_keys_read_as_the_new_ones(tmp_path, key):
    write_tiny("llama", tmp_path, rope_parameters={"rope_theta": 5000.0, **ROPES["llama3"]})
    new = read_config(locate(str(tmp_path)))
    scaling = {name: value for name, value in ROPES["llama3"].items() if name != "rope_type"}
    edit_json(
        tmp_path / "config.json",
        rope_parameters=None,
        rope_theta=5000.0,
        rope_scaling={key: "llama3", **scaling},
    )
    assert new.rope.scaling is RopeScaling.LLAMA3
    assert read_config(locate(str(tmp_path))) == new


def test_dynamic_beyond_the_original_length_rotates_for_the_served_one(tmp_path):
    rope = {"rope_theta": 10_000.0, **ROPES["dynamic"]}
    write_tiny("llama", tmp_path, rope_parameters=rope)
    tokens = random_tokens(700)
    ours = logits(load(tmp_path, max_position=700), tokens)
    assert_same(ours, transformers_logits(tmp_path, tokens))


def test_sharded_checkpoint(tmp_path):
    write_tiny("qwen2", tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokens = random_tokens(40)
    assert_same(logits(load(tmp_path), tokens), transformers_logits(tmp_path, tokens))


def test_prefill_in_pieces_equals_prefill_at_once(tmp_path):
    model = load(write_tiny("qwen3", tmp_path))
    tokens = random_tokens(90)
    attend = LocalAttention()
    cuts = [0, 50, 51, 89, 90]
    pieces = [logits(model, tokens[a:b], a, attend) for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(pieces), logits(model, tokens), atol=1e-4, rtol=0)


def test_tokens_in_any_order(tmp_path):
    """Positions, not rows, say where a token is: a rank's zigzag slices are not contiguous."""
    model = load(write_tiny("llama", tmp_path))
    tokens, order = random_tokens(30), torch.randperm(30)
    seen = {}

    def attend_as(key):
        def attend(layer, q, k, v):
            seen.setdefault(key, []).append((q, k, v))
            return q

        return attend

    with torch.inference_mode():
        model(tokens, torch.arange(30), attend_as("in order"))
        model(tokens[order], order, attend_as("shuffled"))
    for plain, shuffled in zip(seen["in order"], seen["shuffled"], strict=True):
        for a, b in zip(plain, shuffled, strict=True):
            torch.testing.assert_close(a[order], b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_gguf(tmp_path, kind):
    write_tiny(kind, tmp_path / "hf", tie_word_embeddings=kind == "qwen2")
    path = write_gguf(tmp_path / "hf", tmp_path / "model.gguf")
    tokens = random_tokens(60)
    assert_same(logits(load(path), tokens), transformers_logits(tmp_path / "hf", tokens))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("matrix_type", ["F16", "BF16", "Q8_0"])
def test_quantised_gguf(tmp_path, kind, matrix_type):
    """The same as transformers with weights that went through the same rounding."""
    write_tiny(kind, tmp_path / "hf")
    rounding = gguf.GGMLQuantizationType[matrix_type]
    path = write_gguf(tmp_path / "hf", tmp_path / "model.gguf", matrix_type=rounding)
    write_rounded(tmp_path / "hf", rounding)
    tokens = random_tokens(60)
    assert_same(logits(load(path), tokens), transformers_logits(tmp_path / "hf", tokens))


def write_rounded(directory, rounding):
    """Pass the checkpoint's matrices through quantisation, in place."""
    state = load_file(directory / "model.safetensors")
    for name, values in state.items():
        if values.ndim == 2:
            packed = gguf.quants.quantize(values.numpy(), rounding)
            restored = gguf.quants.dequantize(packed, rounding)
            state[name] = torch.from_numpy(np.array(restored, np.float32))
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("rope", "metadata"),
    [
        ("linear", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        (
            "yarn",
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
            },
        ),
    ],
)
def test_gguf_rope_scaling(tmp_path, rope, metadata):
    write_tiny("qwen2", tmp_path / "hf", rope_parameters={"rope_theta": 1e4, **ROPES[rope]})
    path = write_gguf(tmp_path / "hf", tmp_path / "model.gguf", metadata=metadata)
    tokens = random_tokens(300)
    assert_same(logits(load(path), tokens), transformers_logits(tmp_path / "hf", tokens))


def test_gguf_llama3_factors(tmp_path):
    """llama.cpp writes llama3 scaling as a tensor of divisors."""
    parameters = {"rope_theta": 5e5, **ROPES["llama3"], "original_max_position_embeddings": 256}
    write_tiny("llama", tmp_path / "hf", head_dim=64, rope_parameters=parameters)
    plain = 5e5 ** (-np.arange(0, 64, 2) / 64)
    keep = np.clip((256 * plain / (2 * np.pi) - 1.0) / 3.0, 0, 1)
    factors = (1 / ((1 - keep) / 8.0 + keep)).astype(np.float32)
    path = write_gguf(
        tmp_path / "hf", tmp_path / "model.gguf", extra_tensors={"rope_freqs.weight": factors}
    )
    rope = read_config(locate(str(path))).rope
    assert (rope.scaling, rope.factor, rope.original_max_position) == (RopeScaling.LLAMA3, 8, 256)
    tokens = random_tokens(400)
    assert_same(logits(load(path), tokens), transformers_logits(tmp_path / "hf", tokens))
