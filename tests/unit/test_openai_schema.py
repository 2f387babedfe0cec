"""What the OpenAI endpoint takes, with which meaning, and what it refuses by name."""

import json
from collections.abc import Mapping

import pytest

from csps.checkpoint.chat import ChatMessage
from csps.coordinator.openai.schema import ChatRequest, CompletionRequest, parse
from csps.core.attention import AttentionKind, AttentionParams
from csps.core.errors import InvalidRequestError
from csps.core.request import SamplingParams

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: object) -> ChatRequest:
    return parse(ChatRequest, json.dumps({"messages": MESSAGES} | fields).encode())


def completion(**fields: object) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"prompt": "hi"} | fields).encode())


def test_sampling_defaults_are_openais() -> None:
    assert chat().sampling() == SamplingParams(temperature=1.0)
    assert completion().sampling() == SamplingParams(temperature=1.0, max_tokens=16)


def test_every_field_of_sampling_arrives() -> None:
    fields: Mapping[str, object] = {
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "stop": ["a", "b"],
        "stop_token_ids": [4],
        "ignore_eos": True,
        "seed": 11,
    }
    wanted = SamplingParams(
        max_tokens=7,
        min_tokens=2,
        temperature=0.0,
        top_p=0.5,
        top_k=3,
        stop=("a", "b"),
        stop_token_ids=(4,),
        ignore_eos=True,
        seed=11,
    )
    assert chat(**fields).sampling() == wanted
    assert completion(**fields).sampling() == wanted


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
    ],
    ids=str,
)
def test_logprobs_of_chats(fields: Mapping[str, object], logprobs: int | None) -> None:
    assert chat(**fields).sampling().logprobs == logprobs


def test_logprobs_of_completions() -> None:
    assert completion(logprobs=0).sampling().logprobs == 0
    assert completion(logprobs=5).sampling().logprobs == 5


def test_the_newer_name_of_a_limit_wins() -> None:
    assert chat(max_tokens=9, max_completion_tokens=4).sampling().max_tokens == 4
    assert chat(max_completion_tokens=4).sampling().max_tokens == 4


def test_one_stop_string_may_stand_alone() -> None:
    assert chat(stop="END").sampling().stop == ("END",)


def test_minus_one_means_all_tokens() -> None:
    assert chat(top_k=-1).sampling().top_k == 0


def test_null_is_the_same_as_nothing() -> None:
    names = [name for name in ChatRequest.model_fields if name not in ("messages", "model")]
    assert chat(**dict.fromkeys(names)) == chat()


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", ["hi"]),
        (["hi", "ho"], ["hi", "ho"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["hi", [3]], ["hi", [3]]),
    ],
    ids=str,
)
def test_forms_of_prompts(prompt: object, prompts: object) -> None:
    assert completion(prompt=prompt).prompts() == prompts


def test_forms_of_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": parts, "name": "Ann"},
            {"role": "assistant", "content": "c", "tool_calls": [], "refusal": None},
        ]
    )
    (messages,) = request.prompts()
    assert messages == [
        ChatMessage("system", "be brief"),
        ChatMessage("user", "ab"),
        ChatMessage("assistant", "c"),
    ]


def test_attention_is_the_servers_but_for_what_is_set() -> None:
    default = AttentionParams(AttentionKind.CSA, gamma=0.9, window_blocks=3)
    chosen = chat(attention={"gamma": 0.5}).attention
    assert chosen is not None
    assert chosen.over(default) == AttentionParams(AttentionKind.CSA, gamma=0.5, window_blocks=3)
    chosen = chat(attention={"kind": "csa-distance", "window_blocks": 9}).attention
    assert chosen is not None
    assert chosen.over(default) == AttentionParams(
        AttentionKind.CSA_DISTANCE, gamma=0.9, window_blocks=9
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "ann", "metadata": {"a": "b"}, "store": True, "parallel_tool_calls": True},
        {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "tools": []},
        {"tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]},
    ],
    ids=str,
)
def test_what_asks_for_nothing_is_taken(fields: Mapping[str, object]) -> None:
    assert chat(**fields) == chat()


BAD = {
    "messages": ({"messages": "hi"}, "messages", "list, got 'hi'"),
    "role": ({"messages": [{"content": "hi"}]}, "messages[0].role", "required"),
    "content": ({"messages": [*MESSAGES, {"role": "user"}]}, "messages[1].content", "required"),
    "null content": (
        {"messages": [{"role": "assistant", "content": None}]},
        "messages[0].content",
        "a text or a list",
    ),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        "'text', got 'image_url'",
    ),
    "calls": (
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]},
        "messages[0].tool_calls",
        "0",
    ),
    "empty": ({"messages": []}, "messages", "empty"),
    "temperature": ({"temperature": "hot"}, "temperature", "number, got 'hot'"),
    "bool for number": ({"max_tokens": True}, "max_tokens", "integer, got True"),
    "top_k": ({"top_k": 1.5}, "top_k", "integer, got 1.5"),
    "n": ({"n": 0}, "n", "1, got 0"),
    "large n": ({"n": 129}, "n", "128, got 129"),
    "stop": ({"stop": 5}, "stop", "a text or a list of texts"),
    "stops": ({"stop": ["a", 1]}, "stop[1]", "string, got 1"),
    "top_logprobs": ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    "stream_options": ({"stream_options": {}}, "stream_options", "stream"),
    "kind": ({"attention": {"kind": "x"}}, "attention.kind", "'csa-distance', got 'x'"),
    "gamma": ({"attention": {"gamma": "x"}}, "attention.gamma", "number, got 'x'"),
    "attention": ({"attention": {"gama": 1}}, "attention.gama", "not a parameter"),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    "penalty": ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported, got 0.5"),
    "format": ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    "unknown": ({"max_token": 5}, "max_token", "not a parameter"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_chat_names_its_field(name: str) -> None:
    fields, field, needle = BAD[name]
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields).prompts(), chat(**fields).sampling()
    assert caught.value.field == field
    assert needle in caught.value.problem


@pytest.mark.parametrize(
    ("prompt", "field", "needle"),
    [
        (5, "prompt", "a text, a list of token ids"),
        (None, "prompt", "a text, a list of token ids"),
        ([], "prompt", "at least 1"),
        ([1, -2], "prompt[0][1]", "0, got -2"),
        ([[1], [2, 2**32]], "prompt[1][1]", "4294967296"),
        ([1, "a"], "prompt[0][1]", "integer, got 'a'"),
        ([1.5], "prompt[0]", "list, got 1.5"),
    ],
    ids=str,
)
def test_a_bad_prompt_names_its_place(prompt: object, field: str, needle: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(prompt=prompt)
    assert caught.value.field == field
    assert needle in caught.value.problem


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[]", b'"hi"', b"null"], ids=repr)
def test_a_body_that_is_no_object(body: bytes) -> None:
    with pytest.raises(InvalidRequestError, match=r"^body: .*JSON"):
        parse(ChatRequest, body)
