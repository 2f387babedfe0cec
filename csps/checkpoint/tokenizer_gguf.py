"""A `tokenizers` tokenizer from the metadata of a GGUF file.

Keys: ggml's docs/gguf.md, `tokenizer.ggml.*`. Where a key is missing the default is llama.cpp's
(src/llama-vocab.cpp), which files are written for. The pipelines are those of the models' own
tokenizer.json.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from csps.checkpoint.values import Values
from csps.core.errors import CheckpointError

_SPACE = "\u2581"  # SentencePiece's visible space


class _TokenType(IntEnum):
    """`tokenizer.ggml.token_type`; other values are ordinary or unused tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


@dataclass(frozen=True, slots=True)
class _ByteLevelKind:
    """One value of `tokenizer.ggml.pre`.

    `split` is the regular expression that cuts text into words, "" for GPT-2's, which the
    library has built in. `ignore_merges`: a word that is a token stays whole, whatever the
    merges say. `add_bos`: the default where the file is silent.
    """

    split: str = ""
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"

_GPT2 = _ByteLevelKind()
_LLAMA3 = _ByteLevelKind(
    split=rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", ignore_merges=True, add_bos=True
)
_TEKKEN = _ByteLevelKind(
    split=rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ignore_merges=True,
    add_bos=True,
)
_BYTE_LEVEL_KINDS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _ByteLevelKind(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _ByteLevelKind(split=rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}", nfc=True),
    "tekken": _TEKKEN,
}


def build_tokenizer(values: Values) -> tokenizers.Tokenizer:
    """The tokenizer that the metadata of a GGUF file describes.

    `tokenizer.ggml.model` "gpt2" (byte-level BPE) and "llama" (SentencePiece BPE) are known;
    CheckpointError names any other, an unknown `tokenizer.ggml.pre`, or a missing or bad key.
    """
    vocabulary = _Vocabulary(values)
    build = _BUILDERS.get(values.text("tokenizer.ggml.model"))
    if build is None:
        raise values.unsupported("tokenizer.ggml.model", ", ".join(_BUILDERS))
    return build(vocabulary)


class _Vocabulary:
    """The lists of `tokenizer.ggml`, one entry per token id, checked; `values` for the rest."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self.tokens = self.texts("tokenizer.ggml.tokens")
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            raise CheckpointError(
                f"{values.source}: tokenizer.ggml.tokens: a token is listed twice"
            )
        # Without types every token is ordinary.
        self.types = self.numbers("tokenizer.ggml.token_type") or [
            float(_TokenType.NORMAL) for _ in self.tokens
        ]

    def texts(self, key: str) -> list[str]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise CheckpointError(
                f"{self.values.source}: {key} is missing or not a list of strings"
            )
        return value

    def numbers(self, key: str) -> list[float]:
        """One number per token, or an empty list if the key is absent."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or len(value) != len(self.tokens):
            raise CheckpointError(f"{self.values.source}: {key} is not one number per token")
        return value

    def token_id(self, key: str, default: int | None = None) -> int | None:
        if key not in self.values and default is None:
            return None
        token_id = self.values.integer(key, default)
        if not 0 <= token_id < len(self.tokens):
            raise self.values.wrong(key, f"a token id below {len(self.tokens)}")
        return token_id


def _byte_level(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    kind = _BYTE_LEVEL_KINDS.get(vocabulary.values.text("tokenizer.ggml.pre", "default"))
    if kind is None:
        raise vocabulary.values.unsupported("tokenizer.ggml.pre", ", ".join(_BYTE_LEVEL_KINDS))
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary.ids, merges=_merges(vocabulary), ignore_merges=kind.ignore_merges
        )
    )
    if kind.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _byte_level_words(kind)
    backend.decoder = decoders.ByteLevel()
    ends = _ends(vocabulary, add_bos=kind.add_bos)
    _add_tokens(backend, vocabulary, ends)
    _set_post_processor(backend, vocabulary, ends)
    return backend


def _byte_level_words(kind: _ByteLevelKind) -> PreTokenizer:
    steps: list[PreTokenizer] = []
    if kind.single_digits:
        steps.append(pre.Digits(individual_digits=True))
    if kind.split:
        steps.append(pre.Split(Regex(kind.split), behavior="isolated"))
    steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=not kind.split))
    return pre.Sequence(steps)


def _sentence_piece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    unknown = vocabulary.token_id("tokenizer.ggml.unknown_token_id", default=0)
    assert unknown is not None
    given = "tokenizer.ggml.merges" in vocabulary.values
    merges = _merges(vocabulary) if given else _ranked(vocabulary)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=merges,
            unk_token=vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = vocabulary.values.flag("tokenizer.ggml.add_space_prefix", True)
    # A normalizer, not Metaspace: SentencePiece puts its space also before text that has one.
    spaces: list[Normalizer] = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    ends = _ends(vocabulary, add_bos=True, bos=1, eos=2)
    _add_tokens(backend, vocabulary, ends)
    _set_post_processor(backend, vocabulary, ends)
    return backend


def _merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    ids = vocabulary.ids
    for line in vocabulary.texts("tokenizer.ggml.merges"):
        left, _, right = line.partition(" ")
        # Checked here because the library panics on some merges of unknown tokens.
        if left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(
                f"{vocabulary.values.source}: tokenizer.ggml.merges: {line!r} is not two tokens "
                "that make a third"
            )
        merges.append((left, right))
    return merges


def _ranked(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Merges of a SentencePiece BPE model, which keeps only the score of each result.

    SentencePiece joins the neighbours whose union scores highest, so every way to cut a piece
    in two is a merge, ranked by the piece's score (Kudo & Richardson, arXiv 1808.06226, 3.1).
    Only ordinary pieces take part: others are matched whole in the text or never.
    """
    normal = {
        token: index
        for token, index in vocabulary.ids.items()
        if vocabulary.types[index] == _TokenType.NORMAL
    }
    scores = vocabulary.numbers("tokenizer.ggml.scores")
    if not scores:
        raise CheckpointError(
            f"{vocabulary.values.source}: tokenizer.ggml has neither scores nor merges"
        )
    merges: list[tuple[str, str]] = []
    for piece in sorted(normal, key=lambda piece: (-scores[normal[piece]], normal[piece])):
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        merges.extend((left, right) for left, right in cuts if left in normal and right in normal)
    return merges


class _Ends(NamedTuple):
    """The tokens that begin and end a sequence, and whether encoding adds them."""

    bos: int | None
    eos: int | None
    add_bos: bool
    add_eos: bool


def _ends(
    vocabulary: _Vocabulary, *, add_bos: bool, bos: int | None = None, eos: int | None = None
) -> _Ends:
    """What the file says, else the defaults given; CheckpointError if an added one is unknown."""
    ends = _Ends(
        bos=vocabulary.token_id("tokenizer.ggml.bos_token_id", bos),
        eos=vocabulary.token_id("tokenizer.ggml.eos_token_id", eos),
        add_bos=vocabulary.values.flag("tokenizer.ggml.add_bos_token", add_bos),
        add_eos=vocabulary.values.flag("tokenizer.ggml.add_eos_token", False),
    )
    for name, token_id, added in (("bos", ends.bos, ends.add_bos), ("eos", ends.eos, ends.add_eos)):
        if added and token_id is None:
            raise CheckpointError(
                f"{vocabulary.values.source}: tokenizer.ggml.{name}_token_id is missing, "
                "and it is to be added to every text"
            )
    return ends


def _add_tokens(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary, ends: _Ends) -> None:
    """Have control and user-defined tokens matched whole; control ones are skipped in decoding."""
    control, user_defined = [], []
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in (_TokenType.CONTROL, _TokenType.UNKNOWN) or index in (ends.bos, ends.eos):
            control.append(AddedToken(token, special=True, normalized=False))
        elif kind == _TokenType.USER_DEFINED:
            user_defined.append(AddedToken(token, special=False, normalized=False))
    backend.add_special_tokens(control)
    backend.add_tokens(user_defined)


def _set_post_processor(
    backend: tokenizers.Tokenizer, vocabulary: _Vocabulary, ends: _Ends
) -> None:
    template = ["$A"]
    special: list[dict[str, object]] = []
    if ends.add_bos and ends.bos is not None:
        template = ["bos", *template]
        special.append({"id": "bos", "ids": [ends.bos], "tokens": [vocabulary.tokens[ends.bos]]})
    if ends.add_eos and ends.eos is not None:
        template = [*template, "eos"]
        special.append({"id": "eos", "ids": [ends.eos], "tokens": [vocabulary.tokens[ends.eos]]})
    if special:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )


_BUILDERS = {"gpt2": _byte_level, "llama": _sentence_piece}
