"""Small tokenizers for tests: trained here, and written as a directory or a GGUF file."""

import json
from dataclasses import dataclass
from pathlib import Path

import gguf
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from csps.checkpoint.locate import Checkpoint

CORPUS = [
    "the quick brown fox jumps over the lazy dog; the dog sleeps, the fox does not",
    "def quicksort(items):\n    return items if len(items) < 2 else merge(*split(items))\n",
    "In 2024 a long document has 128000 tokens, the longest 1000000.",
    "größer, naïve café, 你好世界 and 👍 are texts too",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


@dataclass(frozen=True)
class SentencePiece:
    """A SentencePiece BPE vocabulary: <unk>, <s>, </s>, 256 bytes, a user token, then pieces."""

    tokens: list[str]
    scores: list[float]
    types: list[int]


def byte_level(vocab_size: int = 400) -> tokenizers.Tokenizer:
    """A GPT-2 style tokenizer that puts <s> (id 0) before a text and knows </s> (id 1)."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return backend


def sentence_piece() -> SentencePiece:
    """Pieces of the corpus as BPE training makes them; score = - order, characters last."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    # No 你: it must fall back to its three bytes.
    corpus = [text.replace("你", "") for text in CORPUS]
    trainer = trainers.BpeTrainer(vocab_size=250, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    pieces = [token for token, _ in sorted(backend.get_vocab().items(), key=lambda pair: pair[1])]
    merged = [piece for piece in pieces if len(piece) > 1]
    single = [piece for piece in pieces if len(piece) == 1]
    ordered = merged + single
    return SentencePiece(
        tokens=[*SPECIAL, *BYTES, "<tool>", *ordered],
        scores=[0.0] * (len(SPECIAL) + len(BYTES) + 1) + [-float(i) for i in range(len(ordered))],
        types=[UNKNOWN, CONTROL, CONTROL]
        + [BYTE] * len(BYTES)
        + [USER_DEFINED]
        + [NORMAL] * len(ordered),
    )


def write_directory(folder: Path, backend: tokenizers.Tokenizer) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return Checkpoint(folder, "hf", folder.name)


def write_gguf(path: Path, **tokenizer: object) -> Checkpoint:
    """A GGUF file with no tensors and the `tokenizer.ggml.*` values given.

    `chat_template` goes to `tokenizer.chat_template`.
    """
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in tokenizer.items():
        key = "tokenizer.chat_template" if name == "chat_template" else f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Checkpoint(path, "gguf", path.stem)


def write_sentence_piece(path: Path, **extra: object) -> Checkpoint:
    vocabulary = sentence_piece()
    return write_gguf(
        path,
        model="llama",
        tokens=vocabulary.tokens,
        scores=vocabulary.scores,
        token_type=vocabulary.types,
        **extra,
    )


def write_byte_level(path: Path, pre: str, **extra: object) -> Checkpoint:
    """The vocabulary of `byte_level` as a GGUF file, <s> and </s> its control tokens."""
    backend = byte_level()
    vocab = backend.get_vocab()
    merges = json.loads(backend.model.__getstate__())["merges"]
    return write_gguf(
        path,
        model="gpt2",
        pre=pre,
        tokens=sorted(vocab, key=vocab.__getitem__),
        token_type=[CONTROL, CONTROL] + [NORMAL] * (len(vocab) - 2),
        merges=[" ".join(pair) for pair in merges],
        bos_token_id=0,
        eos_token_id=1,
        **extra,
    )
