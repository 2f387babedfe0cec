"""The tokens of a trace's prompts: shared prefixes are really shared, and nothing else is."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from csps.trace.schema import TraceRequest

# Tokens that begin a block of real text, drawn by its id: no two blocks begin alike.
STAMP_TOKENS = 8


class PromptMaker:
    """Equal block ids give equal tokens; blocks of other ids, or another seed, differ at once.

    Tokens are random ones below `vocab_size`, or with `text_ids` pieces of a text (each from a
    random place, behind a few random tokens), whose attention is that of text.
    """

    def __init__(
        self,
        block_tokens: int,
        vocab_size: int,
        seed: int,
        text_ids: Sequence[int] | None = None,
    ) -> None:
        assert text_ids is None or len(text_ids) >= block_tokens
        self._block_tokens = block_tokens
        self._vocab_size = vocab_size
        self._seed = seed
        self._text_ids = None if text_ids is None else np.asarray(text_ids)

    def prompt(self, request: TraceRequest) -> list[int]:
        """The request's prompt_tokens token ids."""
        blocks = np.concatenate([self._block(block) for block in request.blocks])
        return blocks[: request.prompt_tokens].tolist()  # type: ignore[no-any-return]

    def _block(self, block: int) -> npt.NDArray[np.int64]:
        random = np.random.default_rng((self._seed, block))
        text, size = self._text_ids, self._block_tokens
        num_drawn = size if text is None else min(STAMP_TOKENS, size)
        drawn = random.integers(self._vocab_size, size=num_drawn)
        if text is None:
            return drawn
        at = random.integers(len(text) - size + 1)
        return np.concatenate([drawn, text[at : at + size - num_drawn]])
