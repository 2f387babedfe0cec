"""Text to token ids and back: a thread-safe view of a Hugging Face `tokenizers` tokenizer."""

import json
from collections.abc import Sequence

import tokenizers

from csps.checkpoint.gguf_metadata import read_metadata
from csps.checkpoint.locate import Checkpoint
from csps.checkpoint.tokenizer_gguf import build_tokenizer
from csps.checkpoint.values import Values
from csps.core.errors import CheckpointError, InvalidRequestError


def load_tokenizer(checkpoint: Checkpoint) -> "Tokenizer":
    """The checkpoint's tokenizer: `tokenizer.json` of a directory, or the metadata of a GGUF file.

    CheckpointError if the file is missing or malformed, or the tokenizer's kind is not supported.
    """
    if checkpoint.kind == "gguf":
        values = Values(str(checkpoint.path), read_metadata(checkpoint.path))
        return Tokenizer(build_tokenizer(values))
    path = checkpoint.path / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; a model directory needs a fast tokenizer's file")
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        raise CheckpointError(f"{path}: not a tokenizer: {error}") from error


class Tokenizer:
    """Encodes and decodes for any number of threads at once.

    The wrapped object must not be changed after construction: the library refuses to change
    one while another thread encodes with it.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # A tokenizer.json can carry its training run's truncation, which would cut prompts short.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._pieces = _PieceDecoder(backend)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    @property
    def vocab_size(self) -> int:
        """Tokens the tokenizer knows. The model's own vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`. Special tokens spelled out in the text become those tokens.

        `add_special_tokens` puts what the checkpoint wants around a prompt (BOS, EOS). A rendered
        chat template has them already: pass False. InvalidRequestError if `text` has a lone
        surrogate, which no UTF-8 text can hold.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                "text", f"is not valid Unicode: lone surrogate at character {error.start}"
            ) from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids` (each >= 0). Ids the tokenizer does not know add nothing to it."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes | None:
        """UTF-8 bytes of one token, which may be part of a character; None for an unknown id.

        What depends on a token's place in the text (a first space that is stripped) is not seen
        here: texts are made by `decode`.
        """
        piece = self._backend.id_to_token(token_id)
        return None if piece is None else self._pieces.to_bytes(piece)


def _byte_level_alphabet() -> dict[str, int]:
    """Character of a byte-level vocabulary -> byte (GPT-2's `bytes_to_unicode`, inverted).

    Printable Latin-1 stands for itself; the other bytes, in order, for U+0100 and on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


class _PieceDecoder:
    """One vocabulary entry to bytes, by the steps of the tokenizer's decoder that work alone."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        decoder = backend.decoder
        steps = [] if decoder is None else [json.loads(decoder.__getstate__())]
        if steps and steps[0]["type"] == "Sequence":
            steps = steps[0]["decoders"]
        kinds = {step["type"] for step in steps}
        self._byte_level = _byte_level_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._replacements = [
            (step["pattern"]["String"], step["content"])
            for step in steps
            if step["type"] == "Replace" and "String" in step["pattern"]
        ] + [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]

    def to_bytes(self, piece: str) -> bytes:
        if self._byte_level is not None:
            try:
                return bytes([self._byte_level[char] for char in piece])
            except KeyError:  # an added token, kept as plain text
                return piece.encode()
        if self._byte_fallback and len(piece) == 6 and piece.startswith("<0x"):
            try:
                return bytes.fromhex(piece[3:5])
            except ValueError:
                return piece.encode()
        for old, new in self._replacements:
            piece = piece.replace(old, new)
        return piece.encode()
