"""What a client asks for: sampling parameters, and how a request ends."""

import math
from dataclasses import dataclass
from enum import StrEnum

from csps.core.errors import InvalidRequestError

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_PROMPT_LOGPROBS = 4096


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context length was reached
    ABORT = "abort"  # cancelled by the client or by Abort


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. The defaults are greedy.

    `max_tokens` None means: up to the context length. `logprobs` None means none;
    0 means the chosen token's alone; n adds the n likeliest. `prompt_logprobs`: last tokens of
    the prompt to score, at least 1 and fewer than it has; None means none.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def validate(self, vocab_size: int) -> None:
        """Raise InvalidRequestError naming the first field out of its limits."""
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidRequestError("max_tokens", f"must be at least 1, got {self.max_tokens}")
        if self.min_tokens < 0:
            raise InvalidRequestError("min_tokens", f"must be at least 0, got {self.min_tokens}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                "min_tokens", f"must be at most max_tokens {self.max_tokens}, got {self.min_tokens}"
            )
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0):
            raise InvalidRequestError("temperature", f"must be in [0, 100], got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:  # NaN fails too
            raise InvalidRequestError("top_p", f"must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise InvalidRequestError("top_k", f"must be at least 0 (0 = off), got {self.top_k}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InvalidRequestError("seed", f"must be in [0, 2^63), got {self.seed}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise InvalidRequestError(
                "logprobs", f"must be in [0, {MAX_LOGPROBS}], got {self.logprobs}"
            )
        scored = self.prompt_logprobs
        if scored is not None and not 1 <= scored <= MAX_PROMPT_LOGPROBS:
            raise InvalidRequestError(
                "prompt_logprobs", f"must be in [1, {MAX_PROMPT_LOGPROBS}], got {scored}"
            )
        self._validate_stops(vocab_size)

    def _validate_stops(self, vocab_size: int) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                "stop", f"at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}"
            )
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
                raise InvalidRequestError(
                    "stop",
                    f"each string must have 1 to {MAX_STOP_STRING_CHARS} characters, "
                    f"got {len(text)}",
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(
                "stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS}, got {len(self.stop_token_ids)}"
            )
        for token_id in self.stop_token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequestError(
                    "stop_token_ids", f"{token_id} is outside the vocabulary [0, {vocab_size})"
                )
