"""Pieces of output to the JSON of OpenAI's answers, whole or in chunks.

https://platform.openai.com/docs/api-reference: objects chat.completion, chat.completion.chunk and
text_completion. Each choice has CSPS's own field besides, `csps`: timings and what a sparse
prefill approximated, as csps.v1.Complete has them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.message import Message

from csps.checkpoint.tokenizer import Tokenizer
from csps.coordinator.frontend import Piece
from csps.coordinator.live import LiveRequest
from csps.coordinator.outcome import attention_report, timings
from csps.core.plan import SampledToken
from csps.core.request import FinishReason

Json = dict[str, Any]


class Choice(ABC):
    """One output of a request as it grows. `part` is asked for every piece, or `whole` at the end.

    `name` and `part_name` are the objects it is part of; `prefix` begins their ids.
    """

    name: str
    part_name: str
    prefix: str

    def __init__(self, index: int, live: LiveRequest, tokenizer: Tokenizer) -> None:
        self.live = live
        self.num_tokens = 0
        self._index = index
        self._tokenizer = tokenizer
        self._texts: list[str] = []
        self._logprobs: Json | None = None

    def take(self, piece: Piece) -> None:
        """For `whole`."""
        self.num_tokens += len(piece.tokens)
        self._texts.append(piece.text)
        new = self._logprobs_of(piece.tokens)
        if self._logprobs is None:
            self._logprobs = new
        elif new is not None:
            for key, values in new.items():
                if values is not None:
                    self._logprobs[key] += values

    def whole(self, finish: FinishReason) -> Json:
        """All that was taken."""
        return self._choice(self._body("".join(self._texts)), self._logprobs, finish)

    def part(self, piece: Piece) -> Json | None:
        """A chunk's choice; None if the piece has nothing to show yet."""
        self.num_tokens += len(piece.tokens)
        logprobs = self._logprobs_of(piece.tokens)
        if not piece.text and logprobs is None:
            return None
        return self._choice(self._part_body(piece.text), logprobs, None)

    def last_part(self, finish: FinishReason) -> Json:
        """Why it ended."""
        return self._choice(self._part_body(""), None, finish)

    def _choice(self, body: Json, logprobs: Json | None, finish: FinishReason | None) -> Json:
        reason = None if finish is None else finish.value
        choice = {"index": self._index, **body, "logprobs": logprobs, "finish_reason": reason}
        return choice if finish is None else choice | {"csps": _outcome(self.live)}

    def _logprobs_of(self, tokens: Sequence[SampledToken]) -> Json | None:
        if self.live.seq.sampling.logprobs is None or not tokens:
            return None
        return self._format_logprobs(tokens)

    def _token(self, token_id: int) -> tuple[str, list[int] | None]:
        """Text and bytes of a token: distinct texts also of parts of characters, as in \\xe2."""
        data = self._tokenizer.token_bytes(token_id)
        if data is None:  # the model's vocabulary may be padded beyond the tokenizer's
            return f"token_id:{token_id}", None
        return data.decode(errors="backslashreplace"), list(data)

    @abstractmethod
    def _body(self, text: str) -> Json: ...

    @abstractmethod
    def _part_body(self, text: str) -> Json: ...

    @abstractmethod
    def _format_logprobs(self, tokens: Sequence[SampledToken]) -> Json: ...


class ChatChoice(Choice):
    """Of a chat completion."""

    name = "chat.completion"
    part_name = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, index: int, live: LiveRequest, tokenizer: Tokenizer) -> None:
        super().__init__(index, live, tokenizer)
        self._begun = False

    def _body(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _part_body(self, text: str) -> Json:
        begun, self._begun = self._begun, True
        role = {} if begun else {"role": "assistant"}
        return {"delta": role | ({"content": text} if text or not begun else {})}

    def _format_logprobs(self, tokens: Sequence[SampledToken]) -> Json:
        content = [
            self._entry(token.token_id, token.logprob)
            | {"top_logprobs": [self._entry(*top) for top in _top(token)]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float | None) -> Json:
        text, data = self._token(token_id)
        return {"token": text, "logprob": logprob, "bytes": data}


class TextChoice(Choice):
    """Of a completion. Offsets of tokens are in the characters of tokens, from 0."""

    name = part_name = "text_completion"
    prefix = "cmpl"

    def __init__(self, index: int, live: LiveRequest, tokenizer: Tokenizer) -> None:
        super().__init__(index, live, tokenizer)
        self._num_chars = 0

    def _body(self, text: str) -> Json:
        return {"text": text}

    def _part_body(self, text: str) -> Json:
        return {"text": text}

    def _format_logprobs(self, tokens: Sequence[SampledToken]) -> Json:
        texts = [self._token(token.token_id)[0] for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._num_chars)
            self._num_chars += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self._token(token_id)[0]: logprob for token_id, logprob in _top(token)}
                for token in tokens
            ],
            "text_offset": offsets,
        }


def _top(token: SampledToken) -> Iterator[tuple[int, float]]:
    return zip(token.top_ids, token.top_logprobs, strict=True)


def usage(choices: Sequence[Choice], num_prompts: int) -> Json:
    """Token counts of an answer. A prompt counts once, however many choices it has."""
    num_choices = len(choices) // num_prompts
    seqs = [choice.live.seq for choice in choices[::num_choices]]
    num_prompt = sum(len(seq.prompt_ids) for seq in seqs)
    num_output = sum(choice.num_tokens for choice in choices)
    num_cached = sum(seq.num_cached or 0 for seq in seqs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def _outcome(live: LiveRequest) -> Json:
    report = attention_report(live)
    attention = None
    if report is not None:
        fields = _fields(report)
        del fields["heads"]
        params = live.seq.attention
        attention = fields | {"kind": params.kind.value, "gamma": params.gamma}
    return {"timings": _fields(timings(live)), "attention": attention}


def _fields(message: Message) -> Json:
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
