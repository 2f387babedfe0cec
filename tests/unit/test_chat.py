"""Chat templates from each place they are kept, what they may use, and how they refuse."""

import datetime
import json

import pytest

from csps.checkpoint.chat import (
    MAX_MESSAGES,
    ChatMessage,
    ChatTemplate,
    load_chat_template,
)
from csps.checkpoint.locate import DEFAULT_MODEL, Checkpoint, locate
from csps.checkpoint.tokenizer import load_tokenizer
from csps.core.errors import CheckpointError, InvalidRequestError
from tests.unit import tiny_tokenizers

HELLO = [ChatMessage("user", "Hello <b>")]
TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m.content }}{{ eos_token }}{% endfor %}"


def _directory(folder, config: object = None, **files: str) -> Checkpoint:
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return Checkpoint(folder, "hf", "m")


def test_default_model() -> None:
    checkpoint = locate(DEFAULT_MODEL)
    template = load_chat_template(checkpoint)
    messages = [ChatMessage("system", "Be brief."), *HELLO, ChatMessage("assistant", "Hi.")]
    turns = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello <b><|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n"
    )
    assert template.render(messages, add_generation_prompt=False) == turns
    assert template.render(messages) == turns + "<|im_start|>assistant\n"
    assert template.render(HELLO).startswith("<|im_start|>system\nYou are a helpful AI")
    ids = load_tokenizer(checkpoint).encode(template.render(messages), add_special_tokens=False)
    assert (ids.count(1), ids.count(2)) == (4, 3)


def test_gguf_special_tokens(tmp_path) -> None:
    source = "{{ bos_token }}" + TURNS
    path = tmp_path / "m.gguf"
    checkpoint = tiny_tokenizers.write_byte_level(path, "gpt-2", chat_template=source)
    assert load_chat_template(checkpoint).render(HELLO) == "<s>[user]Hello <b></s>"


def test_directory_with_one_template(tmp_path) -> None:
    eos = {"content": "</s>", "lstrip": False}  # an added token, described
    checkpoint = _directory(tmp_path, {"chat_template": TURNS, "eos_token": eos})
    assert load_chat_template(checkpoint).render(HELLO) == "[user]Hello <b></s>"


def test_directory_with_named_templates(tmp_path) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TURNS}]
    template = load_chat_template(_directory(tmp_path, {"chat_template": named}))
    assert template.render(HELLO) == "[user]Hello <b>"
    template = load_chat_template(_directory(tmp_path, {"chat_template": named[:1]}))
    assert template.render(HELLO) == "x"


def test_jinja_file_comes_first(tmp_path) -> None:
    checkpoint = _directory(
        tmp_path,
        {"chat_template": "old"},
        chat_template__jinja="{{ bos_token }}new",
        special_tokens_map__json='{"bos_token": "<s>", "additional_special_tokens": []}',
    )
    assert load_chat_template(checkpoint).render(HELLO) == "<s>new"


@pytest.mark.parametrize("config", [None, {}, {"chat_template": []}])
def test_no_template(tmp_path, config: object) -> None:
    template = load_chat_template(_directory(tmp_path, config))
    with pytest.raises(InvalidRequestError, match="no chat template; send text or token ids"):
        template.render(HELLO)


def test_malformed_files_are_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not JSON"):
        load_chat_template(_directory(tmp_path, tokenizer_config__json="{"))
    with pytest.raises(CheckpointError, match="not a JSON object"):
        load_chat_template(_directory(tmp_path, []))
    for bad in (5, [5], [{"name": "default"}]):
        with pytest.raises(CheckpointError, match="neither text nor a list"):
            load_chat_template(_directory(tmp_path, {"chat_template": bad}))
    with pytest.raises(CheckpointError, match="line 2"):
        ChatTemplate("ok\n{% for %}", {})


def _render(source: str, *messages: ChatMessage) -> str:
    return ChatTemplate(source, {}).render(messages or HELLO)


def test_what_templates_may_use() -> None:
    assert _render("{% if true %}\n  a\n  {% endif %}\nb") == "  a\nb"
    assert _render("{{ messages[0].content | tojson }}") == '"Hello <b>"'
    assert _render("{{ {'é': 1} | tojson(indent=1) }}") == '{\n "é": 1\n}'
    assert _render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
    assert (
        _render("{% for i in [1, 2] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "1"
    )
    assert _render("{% generation %}{{ messages[0].role }}{% endgeneration %}!") == "user!"
    assert (
        _render("{% if tools %}t{% endif %}{{ bos_token }}{{ 'g' if add_generation_prompt }}")
        == "g"
    )


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'].items() }}", "items"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ range(10 ** 9) | list }}", "big"),
    ],
)
def test_a_template_that_refuses(source: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        _render(source)
    assert caught.value.field == "messages"


def test_messages_are_validated() -> None:
    template = ChatTemplate(TURNS, {})
    with pytest.raises(InvalidRequestError, match=f"1 to {MAX_MESSAGES} messages, got 0"):
        template.render([])
    with pytest.raises(InvalidRequestError, match=f"got {MAX_MESSAGES + 1}"):
        template.render(HELLO * (MAX_MESSAGES + 1))
    with pytest.raises(InvalidRequestError, match=r"message 1 must be .*assistant.*, got 'root'"):
        template.render([*HELLO, ChatMessage("root", "x")])
    roles = [ChatMessage(role, "") for role in ("system", "user", "assistant", "tool")]
    assert template.render(roles) == "[system][user][assistant][tool]"
