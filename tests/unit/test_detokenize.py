"""Detokenizer: pieces join to the whole decode. StopMatcher: as a search in the whole text."""

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from csps.checkpoint.detokenize import Detokenizer, StopMatcher
from csps.checkpoint.locate import DEFAULT_MODEL, locate
from csps.checkpoint.tokenizer import Tokenizer, load_tokenizer
from tests.unit import tiny_tokenizers

# Texts with what is hard here: multi-byte characters, U+FFFD itself, spaces, special tokens.
HARD = st.sampled_from(
    [
        "你",
        "é",
        "e\u0301",
        "👩‍👧",
        "\ufffd",
        " ",
        "  ",
        "\n",
        "a",
        " the",
        "<|im_end|>",
        "</s>",
        "12",
    ]
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(HARD, max_size=30).map("".join))
CUTS = st.lists(st.integers(0, 7), max_size=40)


@pytest.fixture(scope="module")
def default() -> Tokenizer:
    return load_tokenizer(locate(DEFAULT_MODEL))


@pytest.fixture(scope="module")
def spm(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("spm") / "m.gguf"
    return load_tokenizer(tiny_tokenizers.write_sentence_piece(path))


def _chunks(items, cuts):
    """`items` cut into pieces of the lengths `cuts` (some empty), then single ones."""
    at = 0
    for length in cuts:
        yield items[at : at + length]
        at += length
    for rest in range(at, len(items)):
        yield items[rest : rest + 1]


def _stream(tokenizer, ids, cuts) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(part) for part in _chunks(ids, cuts)] + [detokenizer.flush()]


@given(text=TEXTS, cuts=CUTS)
def test_byte_level_pieces_join_to_decode(default: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = default.encode(text, add_special_tokens=True)
    assert "".join(_stream(default, ids, cuts)) == default.decode(ids)


@given(
    ids=st.lists(st.one_of(st.integers(0, 49151), st.integers(200, 300)), max_size=60), cuts=CUTS
)
def test_any_byte_level_tokens(default: Tokenizer, ids: list[int], cuts: list[int]) -> None:
    # Tokens of a model that writes no text at all, broken characters everywhere.
    assert "".join(_stream(default, ids, cuts)) == default.decode(ids)


@given(text=TEXTS, cuts=CUTS)
@example(text="  你 ", cuts=[])
@example(text="\ufffd" * 8, cuts=[])
def test_sentence_piece_pieces_join_to_decode(spm: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = spm.encode(text, add_special_tokens=True)
    assert "".join(_stream(spm, ids, cuts)) == spm.decode(ids)


def test_a_character_over_several_tokens_comes_whole(default: Tokenizer, spm: Tokenizer) -> None:
    ids = default.encode("a👍🏽b", add_special_tokens=False)
    assert len(ids) == 8
    assert _stream(default, ids, []) == ["a", "", "", "👍", "", "", "🏽", "b", ""]
    ids = spm.encode("the 你\u2581", add_special_tokens=True)
    assert _stream(spm, ids, [])[1:] == ["the", " ", "", "", "你", " ", ""]


def test_special_and_unknown_tokens_leave_no_trace(spm: Tokenizer) -> None:
    the, dog = (spm.encode(word, add_special_tokens=False) for word in ("the", "dog"))
    ids = [1, *the, 2, 10**6, 0, *dog, 2]
    assert "".join(_stream(spm, ids, [])) == "the dog"


def test_what_is_incomplete_comes_with_flush(default: Tokenizer, spm: Tokenizer) -> None:
    ids = default.encode("a👍", add_special_tokens=False)[:-1]
    assert _stream(default, ids, []) == ["a", "", "", "\ufffd"]
    assert _stream(default, ids, [len(ids)]) == ["a", "\ufffd"]
    detokenizer = Detokenizer(spm)
    assert detokenizer.push([3 + 0xE4]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_broken_bytes_do_not_spoil_text_given_out(spm: Tokenizer) -> None:
    # The decoder makes replacement characters of all bytes of a run with a broken one in it.
    good = [3 + byte for byte in "你".encode()]
    assert _stream(spm, [*good, 3 + 0xFF, *good], [3, 1, 3])[:2] == ["你", "\ufffd"]


def test_a_stream_without_character_ends_is_not_held_forever() -> None:
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {char: index for index, char in enumerate(sorted(alphabet))}
    vocab["\u00bd\u00e4"] = len(vocab)  # ends one character, begins the next
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.decoder = tokenizers.decoders.ByteLevel()
    detokenizer = Detokenizer(Tokenizer(backend))
    pieces = [detokenizer.push([vocab["\u00bd\u00e4"]]) for _ in range(100)]
    assert sum(bool(piece) for piece in pieces) >= 5
    assert detokenizer.push([vocab["a"]]).endswith("a")


class _CountingTokenizer(Tokenizer):
    """Counts the tokens it decodes."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__(backend)
        self.num_decoded = 0

    def decode(self, ids, skip_special_tokens=True) -> str:
        self.num_decoded += len(ids)
        return super().decode(ids, skip_special_tokens)


def test_work_per_token_is_constant() -> None:
    tokenizer = _CountingTokenizer(tiny_tokenizers.byte_level())
    ids = tokenizer.encode("the quick 狐狸 jumps. " * 500, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer)
    for token_id in ids:
        detokenizer.push([token_id])
    assert tokenizer.num_decoded < 4 * len(ids)


# --- StopMatcher ---


def _reference(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The occurrence that ends first, the longest of those, by looking at every end."""
    for end in range(len(text) + 1):
        for found in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(found):
                return text[: end - len(found)], found
    return text, None


def _match(text: str, stop: list[str], cuts: list[int]) -> tuple[str, str | None, list[str]]:
    matcher = StopMatcher(stop)
    pieces, matched = [], None
    for part in _chunks(text, cuts):
        piece, matched = matcher.push(part)
        pieces.append(piece)
    pieces.append(matcher.flush())
    return "".join(pieces), matched, pieces


@given(
    text=st.text("ab你", max_size=40),
    stop=st.lists(st.text("ab你", min_size=1, max_size=5), max_size=4),
    cuts=CUTS,
)
def test_stop_strings_as_in_the_whole_text(text: str, stop: list[str], cuts: list[int]) -> None:
    assert _match(text, stop, cuts)[:2] == _reference(text, stop)


@given(text=st.text(max_size=40), stop=st.text(min_size=1, max_size=3), cuts=CUTS)
def test_one_stop_string_is_str_find(text: str, stop: str, cuts: list[int]) -> None:
    emitted, matched, _ = _match(text, [stop], cuts)
    at = text.find(stop)
    assert emitted == (text if at < 0 else text[:at])
    assert matched == (None if at < 0 else stop)


def test_text_is_given_out_as_soon_as_it_cannot_match() -> None:
    matcher = StopMatcher(["\nUser:"])
    assert matcher.push("hi\nUs") == ("hi", None)
    assert matcher.push("u") == ("\nUsu", None)
    assert matcher.push("al\nUser") == ("al", None)
    assert matcher.push(": more") == ("", "\nUser:")
    assert matcher.push("late") == ("", "\nUser:")
    assert matcher.flush() == ""


def test_first_to_end_wins_then_the_longest() -> None:
    assert StopMatcher(["abcd", "bc"]).push("xabcd") == ("xa", "bc")
    assert StopMatcher(["bc", "abc"]).push("xabc") == ("x", "abc")
    assert StopMatcher([]).push("all") == ("all", None)
