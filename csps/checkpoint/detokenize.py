"""A stream of tokens to a stream of text, and stop strings in it."""

import codecs
from collections.abc import Sequence

from csps.checkpoint.tokenizer import Tokenizer

# A token sequence that never ends on a whole character is no text: after so many tokens its
# replacement characters are given out, so that neither latency nor work per token can grow.
_MAX_HELD_TOKENS = 16


class Detokenizer:
    """The text of one request's tokens, in pieces that never change once given out.

    The pieces joined are `tokenizer.decode` of all tokens. A text that is not UTF-8 may differ
    in the number of replacement characters, where the decoder judges a run of bytes as a whole
    (SentencePiece byte fallback) or no token in 16 ends a character.

    A token's text depends on the one before it (leading spaces), so tokens are decoded with
    those of the piece before and the known part is cut off: work per token is constant.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Follows the tokens' bytes to know whether the last ones are an incomplete character.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Tokens [0, sent) have been given out and serve as context; [sent, final) end on a
        # whole character; the others are held back.
        self._window: list[int] = []
        self._sizes: list[int] = []  # bytes of each token of the window
        self._sent = 0
        self._final = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens (special and unknown ones are skipped); the text now final."""
        for token_id in token_ids:
            if token_id in self._tokenizer.special_ids:
                continue
            piece = self._tokenizer.token_bytes(token_id)
            if piece is not None:
                self._append(token_id, piece)
        return self._take()

    def flush(self) -> str:
        """The text held back, at the end of the request."""
        self._final = len(self._window)
        return self._take()

    def _append(self, token_id: int, piece: bytes) -> None:
        self._window.append(token_id)
        self._sizes.append(len(piece))
        self._utf8.decode(piece)
        num_pending = len(self._utf8.getstate()[0])
        first_pending = len(self._window)
        while num_pending > 0:
            first_pending -= 1
            num_pending -= self._sizes[first_pending]
        if num_pending == 0:
            self._final = first_pending
        elif len(self._window) - self._final > _MAX_HELD_TOKENS:
            self._utf8.reset()
            self._final = len(self._window)

    def _take(self) -> str:
        if self._final == self._sent:
            return ""
        known = self._tokenizer.decode(self._window[: self._sent])
        text = self._tokenizer.decode(self._window[: self._final])
        if text.startswith(known):
            text = text[len(known) :]
        else:  # bytes that are no character spoiled the known ones of the same run
            text = self._tokenizer.decode(self._window[self._sent : self._final])
        del self._window[: self._sent], self._sizes[: self._sent]
        self._final -= self._sent
        self._sent = self._final
        return text


class StopMatcher:
    """Finds the first stop string in a text that comes in pieces.

    The match is the occurrence that ends first; of several that end at the same character, the
    longest. This depends on the text only, not on how it is cut. No part of a match is ever
    given out: the longest end of the text that could still become a match is held back.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        assert all(stop), "an empty stop string matches everywhere"
        self._stop = tuple(stop)
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may be given out, the stop string once it is found).

        After a match every call returns ("", the match).
        """
        if self._matched is not None:
            return "", self._matched
        text = self._held + text
        # (end, start) of each string's first occurrence: the least is the match.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            end, start = min(found)
            self._matched, self._held = text[start:end], ""
            return text[:start], self._matched
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        cut = len(text) - num_held
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """The text held back, when generation ends without a match."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of all of it."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0
