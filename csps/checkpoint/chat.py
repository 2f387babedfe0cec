"""Chat messages to the one text a model was trained on, by the checkpoint's Jinja template.

Templates are written for Hugging Face transformers (docs, "Chat templates"): the environment
below offers what those may use. They come with the weights, so they run in a sandbox.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from csps.checkpoint.gguf_metadata import read_metadata
from csps.checkpoint.locate import Checkpoint
from csps.core.errors import CheckpointError, InvalidRequestError

ROLES = ("system", "user", "assistant", "tool")
MAX_MESSAGES = 4096


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation. `role` is one of ROLES."""

    role: str
    content: str


def load_chat_template(checkpoint: Checkpoint) -> "ChatTemplate":
    """The checkpoint's chat template; one that refuses every chat if the checkpoint has none.

    A directory: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`. A GGUF
    file: `tokenizer.chat_template`. CheckpointError if a file is malformed or does not compile.
    """
    if checkpoint.kind == "gguf":
        return _from_gguf(read_metadata(checkpoint.path))
    return _from_directory(checkpoint.path)


class ChatTemplate:
    """A compiled template, safe to use from several threads.

    `source` None is a model without a template. `special_tokens` are the variables a template
    may print, such as `bos_token`.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = None if source is None else _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"chat template: line {error.lineno}: {error.message}") from error

    @property
    def is_available(self) -> bool:
        """Whether the checkpoint has a template."""
        return self._template is not None

    def render(self, messages: Sequence[ChatMessage], add_generation_prompt: bool = True) -> str:
        """The prompt's text, special tokens spelled out: encode it without adding any.

        `add_generation_prompt` ends it where the assistant's answer begins. InvalidRequestError
        if there is no template, a role is unknown, or the template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequestError(
                "messages", "the model has no chat template; send text or token ids"
            )
        _validate(messages)
        try:
            return self._template.render(
                messages=[{"role": item.role, "content": item.content} for item in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            # All but the first come from a template that expects other messages than these.
            reason = f"the model's chat template refuses them: {error}"
            raise InvalidRequestError("messages", reason) from error


def _validate(messages: Sequence[ChatMessage]) -> None:
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequestError(
            "messages", f"must be 1 to {MAX_MESSAGES} messages, got {len(messages)}"
        )
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequestError(
                "messages",
                f"role of message {index} must be one of {', '.join(ROLES)}, got {message.role!r}",
            )


def _from_gguf(metadata: Mapping[str, object]) -> ChatTemplate:
    source = metadata.get("tokenizer.chat_template")
    if source is not None and not isinstance(source, str):
        raise CheckpointError("tokenizer.chat_template: not a string")
    tokens = metadata.get("tokenizer.ggml.tokens")
    special_tokens = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(tokens, list) and isinstance(token_id, int) and 0 <= token_id < len(tokens):
            special_tokens[f"{name}_token"] = tokens[token_id]
    return ChatTemplate(source, special_tokens)


def _from_directory(folder: Path) -> ChatTemplate:
    config = _read_json(folder / "tokenizer_config.json")
    special_tokens = {}
    for file in (_read_json(folder / "special_tokens_map.json"), config):
        for key, value in file.items():
            # A token is its text, or a description of an added token that holds it.
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                special_tokens[key] = text
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        source: str | None = alone.read_text(encoding="utf-8")
    else:
        source = _pick(config.get("chat_template"))
    return ChatTemplate(source, special_tokens)


def _pick(entry: object) -> str | None:
    """A config's template: the text, or of several named ones "default", or the only one."""
    if entry is None or isinstance(entry, str):
        return entry
    named: dict[str, str] = {}
    for item in entry if isinstance(entry, list) else [entry]:
        name, template = (
            (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
        )
        if not isinstance(name, str) or not isinstance(template, str):
            raise CheckpointError(
                "tokenizer_config.json: chat_template is neither text nor a list of named templates"
            )
        named[name] = template
    return named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    helpers: dict[str, Callable[..., object]] = {
        "raise_exception": _raise,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(helpers)
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}`, which marks the assistant's tokens for training: here only its text."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own type for it)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and &, which the model never saw in training.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(reason: str) -> NoReturn:
    raise jinja2.TemplateError(reason)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
