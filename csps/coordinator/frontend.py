"""From a prompt to a live request and from its tokens to text; shared by every protocol.

Tokenizing and detokenizing run in a thread pool: the event loop must never stall.
"""

import asyncio
import itertools
import math
import secrets
import time
import zlib
from array import array
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeGuard, cast

from csps.checkpoint.chat import ChatMessage, ChatTemplate
from csps.checkpoint.detokenize import Detokenizer, StopMatcher
from csps.checkpoint.tokenizer import Tokenizer
from csps.coordinator.live import Ended, LiveRequest, Prefilled, Token
from csps.coordinator.loop import EngineLoop
from csps.coordinator.sparse import SparseSummary
from csps.core.attention import AttentionKind, AttentionParams
from csps.core.errors import ContextLengthError, DuplicateRequestError, InvalidRequestError
from csps.core.model_config import ModelConfig
from csps.core.plan import SampledToken
from csps.core.request import FinishReason, SamplingParams
from csps.core.strategy import Placement
from csps.sched.sequence import Sequence as Seq

MAX_REQUEST_ID_CHARS = 128
# What is below draws the likeliest token anyway, and logits divided by it may not be finite.
MIN_TEMPERATURE = 1e-5
# No tokenizer makes more characters of a token than this: longer texts are refused unread.
MAX_CHARS_PER_TOKEN = 64
# Headers or metadata, https://www.w3.org/TR/trace-context/
TRACE_CONTEXT = ("traceparent", "tracestate")

Prompt = str | Sequence[int] | Sequence[ChatMessage]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the front needs of the model; the weights are the ranks'."""

    name: str
    config: ModelConfig
    max_model_len: int
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens drawn and the text that became final with them (it may lag behind)."""

    tokens: tuple[SampledToken, ...]
    text: str


class Frontend:
    """Validates, tokenizes, submits; then streams what the engine loop hands out."""

    def __init__(
        self,
        model: ServedModel,
        loop: EngineLoop,
        *,
        placement: Placement,
        csa_min_tokens: int,
        num_threads: int = 2,
    ) -> None:
        self.model = model
        self.loop = loop
        self._placement = placement
        self._csa_min_tokens = csa_min_tokens
        # Apart: a book being tokenized must not hold up the text of running streams.
        self._encoders = ThreadPoolExecutor(num_threads, thread_name_prefix="encode")
        self._decoders = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._seq_ids = itertools.count()
        self._reserved: set[str] = set()

    def close(self) -> None:
        for pool in (self._encoders, self._decoders):
            pool.shutdown(wait=False, cancel_futures=True)

    async def submit(
        self,
        request_id: str,
        model: str,
        prompt: Prompt,
        sampling: SamplingParams,
        attention: AttentionParams,
        *,
        report_heads: bool = False,
        time_left_s: float | None = None,
        trace_context: Mapping[str, str] | None = None,
    ) -> LiveRequest:
        """A queued request. Raises InvalidRequestError, OverloadedError, DuplicateRequestError.

        `time_left_s`: after that the client is gone. `trace_context`: W3C headers, for tracing.
        """
        received = time.monotonic()
        request_id = self._check_id(request_id)
        if model and model != self.model.name:
            raise InvalidRequestError("model", f"{model!r} is not served, {self.model.name!r} is")
        sampling.validate(self.model.config.vocab_size)
        attention.validate()
        if attention.is_sparse and self._placement is not Placement.TOKENS:
            raise InvalidRequestError(
                "attention.kind",
                f"{attention.kind} needs KV spread by tokens; this server's strategy attends dense",
            )
        if sampling.temperature < MIN_TEMPERATURE:
            sampling = replace(sampling, temperature=0.0)
        elif sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(63))
        self._reserved.add(request_id)  # held while tokenizing: a second one must not slip in
        try:
            prompt_ids = await self._encode(prompt)
        finally:
            self._reserved.discard(request_id)
        self._check_prompt(prompt_ids, sampling)
        live = LiveRequest(
            request_id=request_id,
            seq=Seq(
                next(self._seq_ids),
                tuple(prompt_ids),
                sampling,
                frozenset(self.model.config.eos_token_ids),
                self._attention(prompt_ids, attention),
            ),
            received=received,
            deadline=math.inf if time_left_s is None else received + time_left_s,
            sparse=SparseSummary(keep_heads=report_heads),
            trace_context=trace_context or {},
        )
        self.loop.submit(live)
        return live

    async def stream(
        self, live: LiveRequest
    ) -> AsyncGenerator[Prefilled | Piece | FinishReason, None]:
        """Progress and pieces, at last the finish reason. Closing it early ends the request."""
        stops = StopMatcher(live.seq.sampling.stop)
        detokenizer = Detokenizer(self.model.tokenizer)
        try:
            while True:
                events = [await live.events.get()]
                while not live.events.empty():
                    events.append(live.events.get_nowait())
                for event in events:
                    if isinstance(event, Prefilled):
                        yield event
                drawn = [event for event in events if isinstance(event, Token)]
                ended = next((event for event in events if isinstance(event, Ended)), None)
                if ended is not None and ended.error is not None:
                    live.error = ended.error
                    raise ended.error
                finish = ended.finish if ended is not None else None
                if drawn and drawn[-1].finish is not None:
                    finish = drawn[-1].finish
                if drawn or finish is not None:
                    piece, stopped = await self._decode(
                        detokenizer, stops, [event.token for event in drawn], finish is not None
                    )
                    finish = FinishReason.STOP if stopped else finish
                    yield piece
                if finish is not None:
                    live.finish = finish
                    yield finish
                    return
        finally:
            self.loop.close(live)

    def _check_id(self, request_id: str) -> str:
        if len(request_id) > MAX_REQUEST_ID_CHARS:
            raise InvalidRequestError(
                "request_id", f"at most {MAX_REQUEST_ID_CHARS} characters, got {len(request_id)}"
            )
        if request_id in self._reserved or self.loop.is_live(request_id):
            raise DuplicateRequestError(f"request_id: {request_id!r} is live already")
        return request_id or f"csps-{secrets.token_hex(8)}"

    async def _encode(self, prompt: Prompt) -> Sequence[int]:
        if not prompt:
            raise InvalidRequestError("prompt", "is empty; it must have at least one token")
        run = asyncio.get_running_loop().run_in_executor
        if isinstance(prompt, str):
            self._check_chars("text", len(prompt))
            return await run(self._encoders, self._tokenize_text, prompt)
        if _is_chat(prompt):
            self._check_chars("messages", sum(len(message.content) for message in prompt))
            return await run(self._encoders, self._tokenize_chat, prompt)
        return cast("Sequence[int]", prompt)

    def _tokenize_text(self, text: str) -> list[int]:
        return self.model.tokenizer.encode(text, add_special_tokens=True)

    def _tokenize_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        text = self.model.chat_template.render(messages)
        return self.model.tokenizer.encode(text, add_special_tokens=False)

    def _check_chars(self, field: str, num_chars: int) -> None:
        limit = self.model.max_model_len * MAX_CHARS_PER_TOKEN
        if num_chars > limit:
            raise ContextLengthError(
                field,
                f"{num_chars} characters cannot fit the context of {self.model.max_model_len} "
                f"tokens (limit {limit} characters)",
            )

    def _check_prompt(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        vocab_size, limit = self.model.config.vocab_size, self.model.max_model_len
        if not prompt_ids:
            raise InvalidRequestError("prompt", "has no token; it must have at least one")
        if len(prompt_ids) >= limit:
            raise ContextLengthError(
                "prompt",
                f"{len(prompt_ids)} tokens leave no room for output: the context is {limit} "
                "tokens for both",
            )
        if max(prompt_ids) >= vocab_size:
            raise InvalidRequestError(
                "token_ids", f"{max(prompt_ids)} is outside the vocabulary [0, {vocab_size})"
            )
        if (sampling.prompt_logprobs or 0) >= len(prompt_ids):
            raise InvalidRequestError(
                "prompt_logprobs",
                f"must be less than the prompt's {len(prompt_ids)} tokens (the first has none), "
                f"got {sampling.prompt_logprobs}",
            )
        if sampling.max_tokens is not None and len(prompt_ids) + sampling.max_tokens > limit:
            raise ContextLengthError(
                "max_tokens",
                f"{len(prompt_ids)} prompt tokens and {sampling.max_tokens} output tokens exceed "
                f"the context of {limit} tokens",
            )

    def _attention(self, prompt_ids: Sequence[int], asked: AttentionParams) -> AttentionParams:
        """What the prompt gets: a short one is dense. The same prompt always probes alike."""
        if not asked.is_sparse or len(prompt_ids) < self._csa_min_tokens:
            return replace(asked, kind=AttentionKind.DENSE)
        return replace(asked, seed=zlib.crc32(array("I", prompt_ids).tobytes()))

    async def _decode(
        self,
        detokenizer: Detokenizer,
        stops: StopMatcher,
        tokens: list[SampledToken],
        is_last: bool,
    ) -> tuple[Piece, bool]:
        return await asyncio.get_running_loop().run_in_executor(
            self._decoders, _decode, detokenizer, stops, tokens, is_last
        )


def _is_chat(prompt: Sequence[int] | Sequence[ChatMessage]) -> TypeGuard[Sequence[ChatMessage]]:
    return isinstance(prompt[0], ChatMessage)


def _decode(
    detokenizer: Detokenizer, stops: StopMatcher, tokens: list[SampledToken], is_last: bool
) -> tuple[Piece, bool]:
    """Text of new tokens, up to a stop string; tokens after the one that ends it are dropped."""
    text = ""
    for count, token in enumerate(tokens, start=1):
        new, matched = stops.push(detokenizer.push([token.token_id]))
        text += new
        if matched is not None:
            return Piece(tuple(tokens[:count]), text), True
    if is_last:
        new, matched = stops.push(detokenizer.flush())
        text += new if matched is not None else new + stops.flush()
        return Piece(tuple(tokens), text), matched is not None
    return Piece(tuple(tokens), text), False


def elapsed(live: LiveRequest, moment: float) -> float:
    """Seconds from the request's arrival to `moment`; 0 for what has not happened."""
    return moment - live.received if moment and math.isfinite(moment) else 0.0
