"""Tokenizers from a directory and from GGUF metadata, against known ids and a naive reference."""

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from csps.checkpoint.gguf_metadata import read_metadata
from csps.checkpoint.locate import DEFAULT_MODEL, Checkpoint, locate
from csps.checkpoint.tokenizer import Tokenizer, load_tokenizer
from csps.checkpoint.tokenizer_gguf import build_tokenizer
from csps.checkpoint.values import Values
from csps.core.errors import CheckpointError, InvalidRequestError
from tests.unit import tiny_tokenizers


@pytest.fixture(scope="module")
def default() -> Tokenizer:
    return load_tokenizer(locate(DEFAULT_MODEL))


# Ids as transformers gives them for the same file. It does not split digits beyond ASCII ("½"),
# which the model's own tokenizer.json does.
KNOWN = {
    "": [],
    "Hello world": [19556, 905],
    "def f(x):\n\treturn x**2": [1604, 275, 24, 104, 727, 198, 197, 5406, 1792, 828, 34],
    "In 2024, ½": [788, 216, 34, 32, 34, 36, 28, 216, 16738],
    "e\u0301 👍🏽": [85, 151, 219, 15107, 235, 231, 10813, 233, 138],
    "你好，世界": [18645, 250, 48392, 138, 12831, 7906, 240, 178, 239, 230],
    "<|im_start|>user\nhi<|im_end|>": [1, 4093, 198, 6004, 2],
    "  a\n\n b ": [216, 253, 1116, 278, 216],
}


@pytest.mark.parametrize("text", KNOWN)
def test_default_model_ids(default: Tokenizer, text: str) -> None:
    assert default.encode(text, add_special_tokens=True) == KNOWN[text]
    assert default.decode(KNOWN[text], skip_special_tokens=False) == text


def test_default_model_vocabulary(default: Tokenizer) -> None:
    assert default.vocab_size == 49152
    assert default.special_ids == frozenset(range(17))
    assert default.decode([1, 4093, 2, 10**6]) == "user"


# The model's vocabulary lacks six control bytes and F1 and F2, which begin unassigned planes.
MISSING_BYTES = bytes([0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2])


@given(text=st.text(max_size=200))
def test_byte_level_round_trip(default: Tokenizer, text: str) -> None:
    text = text.encode().translate(None, MISSING_BYTES).decode(errors="ignore")
    ids = default.encode(text, add_special_tokens=False)
    assert default.decode(ids, skip_special_tokens=False) == text
    assert b"".join(default.token_bytes(i) or b"" for i in ids) == text.encode()


def test_lone_surrogate_is_refused(default: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match=r"^text: .* at character 2"):
        default.encode("ab\ud800", add_special_tokens=True)


def test_threads_encode_alike(default: Tokenizer) -> None:
    texts = [f"{i} quick brown foxes, line {i}\n" * 50 for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda text: default.encode(text, False), texts))
        assert list(pool.map(default.decode, ids)) == texts
    assert ids == [default.encode(text, False) for text in texts]


def test_directory(tmp_path) -> None:
    backend = tiny_tokenizers.byte_level()
    # What training left in the file must not cut or pad prompts.
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = load_tokenizer(tiny_tokenizers.write_directory(tmp_path, backend))
    text = "the quick brown fox jumps over the lazy dog"
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert ids[0] == 0
    assert ids[1:] == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"<s>{text}"
    assert tokenizer.special_ids == {0, 1}
    assert tokenizer.vocab_size == 400


def test_directory_without_tokenizer(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        load_tokenizer(Checkpoint(tmp_path, "hf", "x"))
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(Checkpoint(tmp_path, "hf", "x"))


# --- byte-level GGUF ---

SPLITS = {
    "gpt-2": (
        "It's 12345 o'clock\n\n  ok!",
        ["It", "'s", " 12345", " o", "'", "clock", "\n\n ", " ok", "!"],
    ),
    "smollm": ("a 123½", ["a", " ", "1", "2", "3", "½"]),
    "llama-bpe": (
        "It'S 12345 ok!\n\n  x",
        ["It", "'S", " ", "123", "45", " ok", "!\n\n", " ", " x"],
    ),
    "qwen2": ("It'S 123 ok!\n\n  x", ["It", "'S", " ", "1", "2", "3", " ok", "!\n\n", " ", " x"]),
    "tekken": ("fooBar 12 ok!/", ["foo", "Bar", " ", "1", "2", " ok", "!/"]),
}


@pytest.mark.parametrize("pre", SPLITS)
def test_words_of_each_pre_tokenizer(tmp_path, pre: str) -> None:
    text, words = SPLITS[pre]
    path = tiny_tokenizers.write_byte_level(tmp_path / "m.gguf", pre).path
    backend = build_tokenizer(Values("m", read_metadata(path)))
    spans = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:stop] for start, stop in spans] == words


def test_gguf_equals_the_tokenizer_it_was_made_from(tmp_path) -> None:
    original = tiny_tokenizers.byte_level()
    tokenizer = load_tokenizer(tiny_tokenizers.write_byte_level(tmp_path / "m.gguf", "gpt-2"))
    for text in [*tiny_tokenizers.CORPUS, " </s>x<s>", "\x00\t "]:
        ids = original.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special_tokens=True) == ids
        assert tokenizer.decode(ids) == original.decode(ids)


@pytest.mark.parametrize(
    ("pre", "flags", "before", "after"),
    [
        ("gpt-2", {}, [], []),
        ("llama-bpe", {}, [0], []),
        ("llama-bpe", {"add_bos_token": False}, [], []),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, [0], [1]),
        ("qwen2", {"add_eos_token": True}, [], [1]),
    ],
)
def test_added_ends(tmp_path, pre: str, flags: dict, before: list, after: list) -> None:
    tokenizer = load_tokenizer(tiny_tokenizers.write_byte_level(tmp_path / "m", pre, **flags))
    plain = tokenizer.encode("the dog", add_special_tokens=False)
    assert tokenizer.encode("the dog", add_special_tokens=True) == before + plain + after


def test_qwen2_composes_characters(tmp_path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizers.write_byte_level(tmp_path / "m", "qwen2"))
    assert tokenizer.decode(tokenizer.encode("cafe\u0301", False)) == "caf\u00e9"


def test_ignore_merges_keeps_a_word_that_is_a_token(tmp_path) -> None:
    letters = ["a", "b", "c", "ab", "abc"]  # no merge leads to abc
    for pre, ids in (("gpt-2", [3, 2]), ("llama-bpe", [4])):
        checkpoint = tiny_tokenizers.write_gguf(
            tmp_path / pre,
            model="gpt2",
            pre=pre,
            tokens=letters,
            merges=["a b"],
            add_bos_token=False,
        )
        assert load_tokenizer(checkpoint).encode("abc", True) == ids


def test_user_defined_tokens_stay_whole_and_visible(tmp_path) -> None:
    checkpoint = tiny_tokenizers.write_gguf(
        tmp_path / "m",
        model="gpt2",
        tokens=["a", "aa", "<think>", "é b"],
        token_type=[tiny_tokenizers.NORMAL] * 2 + [tiny_tokenizers.USER_DEFINED] * 2,
        merges=["a a"],
    )
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode("a<think>aaé b", add_special_tokens=True)
    assert ids == [0, 2, 1, 3]
    assert tokenizer.decode(ids) == "a<think>aaé b"
    assert tokenizer.token_bytes(3) == "é b".encode()
    assert not tokenizer.special_ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model 't5' is not supported"),
        ({"pre": "falcon"}, "tokenizer.ggml.pre 'falcon' is not supported"),
        ({"tokens": "a"}, "tokenizer.ggml.tokens"),
        ({"tokens": ["a", "a", "b"]}, "listed twice"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type"),
        ({"merges": ["ab"]}, "merges: 'ab' is not two tokens"),
        ({"merges": ["a ab"]}, "merges: 'a ab' is not two tokens"),
        ({"merges": ["a "]}, "merges: 'a ' is not two tokens"),
        ({"bos_token_id": 7}, "tokenizer.ggml.bos_token_id"),
        ({"add_bos_token": True}, "tokenizer.ggml.bos_token_id is missing"),
        ({"model": "llama", "merges": None}, "neither scores nor merges"),
    ],
)
def test_bad_metadata_is_named(change: dict, message: str) -> None:
    values = {"model": "gpt2", "tokens": ["a", "b", "ab"], "merges": ["a b"]} | change
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    with pytest.raises(CheckpointError, match=message):
        build_tokenizer(Values("file.gguf", metadata))


# --- SentencePiece GGUF ---


def _naive_sentence_piece(vocabulary: tiny_tokenizers.SentencePiece, text: str) -> list[int]:
    """SentencePiece BPE as defined: join the best-scoring neighbours, leftmost first."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    pieces = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        joins = [
            (-vocabulary.scores[ids[joined]], at)
            for at in range(len(pieces) - 1)
            if vocabulary.types[ids.get(joined := pieces[at] + pieces[at + 1], 0)]
            == tiny_tokenizers.NORMAL
        ]
        if not joins:
            break
        at = min(joins)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    out: list[int] = []
    for piece in pieces:
        known = [ids[piece]] if piece in ids else [3 + byte for byte in piece.encode()]
        out.extend(known)
    return out


def test_sentence_piece_equals_its_definition(tmp_path) -> None:
    vocabulary = tiny_tokenizers.sentence_piece()
    tokenizer = load_tokenizer(tiny_tokenizers.write_sentence_piece(tmp_path / "m.gguf"))
    rng = random.Random(5)
    words = " ".join(tiny_tokenizers.CORPUS).split(" ")
    texts = [*tiny_tokenizers.CORPUS, " x", "  two", "x  y\n", "\t🦊你", "\U0001f1e9"]
    texts += [" ".join(rng.choices(words, k=12)) for _ in range(50)]
    texts += ["".join(rng.choices("thequickfo (12) é你", k=30)) for _ in range(50)]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert ids == [1, *_naive_sentence_piece(vocabulary, text)], text
        assert tokenizer.decode(ids) == text


def test_sentence_piece_special_tokens_and_prefix(tmp_path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizers.write_sentence_piece(tmp_path / "a.gguf"))
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.encode("", add_special_tokens=True) == [1]
    ids = tokenizer.encode("the dog</s><tool>", add_special_tokens=False)
    assert ids[-2:] == [2, 259]
    assert tokenizer.decode(ids) == "the dog<tool>"
    assert tokenizer.token_bytes(3 + 0xE4) == b"\xe4"
    assert tokenizer.token_bytes(ids[0]) == b" the"
    assert tokenizer.token_bytes(10**6) is None
    bare = load_tokenizer(
        tiny_tokenizers.write_sentence_piece(
            tmp_path / "b.gguf", add_space_prefix=False, add_bos_token=False
        )
    )
    ids = bare.encode("the dog", add_special_tokens=True)
    assert b"".join(bare.token_bytes(i) or b"" for i in ids) == b"the dog"
    assert bare.decode(ids) == "the dog"
    assert bare.decode(bare.encode(" the", True)) == " the"


def test_decoder_without_byte_rules(tmp_path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"\u2581a": 0, "b": 1}, []))
    backend.decoder = tokenizers.decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    assert tokenizer.token_bytes(0) == b" a"
    assert tokenizer.decode([0, 1, 0]) == "ab a"


def test_text_modules_need_no_torch() -> None:
    code = (
        "import sys, csps.checkpoint.chat, csps.checkpoint.detokenize\n"
        "sys.exit(bool({'torch', 'triton', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
