"""Bodies of requests: OpenAI's fields that are served, and CSPS's own beside them.

https://platform.openai.com/docs/api-reference. What is checked here is form; limits are those of
every protocol (csps.core.request).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from csps.checkpoint.chat import ChatMessage
from csps.core.attention import AttentionKind, AttentionParams
from csps.core.errors import InvalidRequestError
from csps.core.request import SamplingParams

MAX_CHOICES = 128

# Taken, and without effect: they steer what this server does not have.
_WITHOUT_EFFECT = frozenset({
    "user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier", "parallel_tool_calls", "reasoning_effort", "verbosity",
})  # fmt: skip

# Not served: taken only with the value that asks for nothing (null always does).
_NOT_SERVED: Mapping[str, object] = {
    "audio": None,
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "modalities": ["text"],
    "prediction": None,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
    "web_search_options": None,
}


def _list_of_texts(value: object) -> object:
    return _checked([value] if isinstance(value, str) else value, "a text or a list of texts")


def _list_of_prompts(value: object) -> object:
    is_ids = isinstance(value, list) and bool(value) and isinstance(value[0], int)
    prompts = [value] if is_ids or isinstance(value, str) else value
    return _checked(prompts, "a text, a list of token ids, or a list of such")


def _list_of_parts(value: object) -> object:
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
    return _checked(parts, "a text or a list of parts of text")


def _checked(value: object, form: str) -> object:
    if not isinstance(value, list):
        raise PydanticCustomError("form", "must be {form}", {"form": form})
    return value


# Where a field has several forms, one is made of them or the value's type chooses: trying each, as
# a plain union does, would answer with the errors of all. Tags are no names, so `_name` skips them.
_Texts = Annotated[list[str], BeforeValidator(_list_of_texts)]
_TokenIds = list[Annotated[int, Field(ge=0, lt=2**32)]]
_Prompt = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[_TokenIds, Tag("<ids>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<ids>"),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Strict):
    """`include_usage`: a last chunk counts tokens."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    include_usage: bool | None = None


class Attention(_Strict):
    """How the prompt's prefill attends; what is left out is the server's."""

    kind: Annotated[AttentionKind | None, Field(strict=False)] = None
    gamma: float | None = None
    window_blocks: int | None = None

    def over(self, default: AttentionParams) -> AttentionParams:
        """The server's choice, but for what is set here."""
        return AttentionParams(
            kind=default.kind if self.kind is None else self.kind,
            gamma=default.gamma if self.gamma is None else self.gamma,
            window_blocks=default.window_blocks
            if self.window_blocks is None
            else self.window_blocks,
        )


class _Request(_Strict):
    """What both endpoints take. `min_tokens` to `attention` are not OpenAI's."""

    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: _Texts | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    min_tokens: int | None = None
    top_k: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    attention: Attention | None = None

    def _sampling(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=0 if self.top_k in (None, -1) else self.top_k,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            seed=self.seed,
            logprobs=logprobs,
        )


class TextPart(_Strict):
    """A part of a message; others than text are refused."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a chat."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    role: str
    content: Annotated[list[TextPart], BeforeValidator(_list_of_parts)]
    tool_calls: Annotated[list[object], Field(max_length=0)] | None = None

    def to_core(self) -> ChatMessage:
        # OpenAI's later name for what templates call system.
        role = "system" if self.role == "developer" else self.role
        return ChatMessage(role, "".join(part.text for part in self.content))


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def prompts(self) -> list[list[ChatMessage]]:
        if not self.messages:
            raise InvalidRequestError("messages", "is empty; at least one message is needed")
        return [[message.to_core() for message in self.messages]]

    def sampling(self) -> SamplingParams:
        """Without a limit the answer may fill the context."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs", "needs logprobs to be true")
        limit = self.max_completion_tokens
        return self._sampling(
            self.max_tokens if limit is None else limit,
            (self.top_logprobs or 0) if self.logprobs else None,
        )


class CompletionRequest(_Request):
    """POST /v1/completions. `prompt`: one or several, each a text or token ids."""

    prompt: Annotated[list[_Prompt], Field(min_length=1), BeforeValidator(_list_of_prompts)]
    logprobs: int | None = None

    def prompts(self) -> list[str | list[int]]:
        return self.prompt

    def sampling(self) -> SamplingParams:
        """Without a limit the answer has 16 tokens, as OpenAI's."""
        return self._sampling(16 if self.max_tokens is None else self.max_tokens, self.logprobs)


AnyRequest = ChatRequest | CompletionRequest
_R = TypeVar("_R", ChatRequest, CompletionRequest)


def parse(kind: type[_R], body: bytes) -> _R:
    """A request's body. InvalidRequestError names a field that is wrong, unknown or not served."""
    try:
        fields = pydantic_core.from_json(body)
    except ValueError as error:
        raise InvalidRequestError("body", f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequestError("body", "must be a JSON object")
    request = _validate(kind, _served(fields))
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("stream_options", "needs stream to be true")
    return request


def _served(fields: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in fields.items():
        if name in _NOT_SERVED:
            neutral = _NOT_SERVED[name]
            if value is not None and value != neutral:
                raise InvalidRequestError(name, f"is not supported, got {_short(value)}")
        elif name not in _WITHOUT_EFFECT:
            kept[name] = value
    return kept


def _validate(kind: type[_R], fields: Mapping[str, Any]) -> _R:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = _name(first["loc"])
        if first["type"] == "extra_forbidden":
            raise InvalidRequestError(field, "is not a parameter of this endpoint") from None
        problem = first["msg"][0].lower() + first["msg"][1:]
        if first["type"] != "missing":
            problem += f", got {_short(first['input'])}"
        raise InvalidRequestError(field, problem) from None


def _name(loc: Sequence[str | int]) -> str:
    """As in messages[0].content."""
    name = ""
    for part in loc:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier():
            name += f".{part}"
    return name[1:]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
