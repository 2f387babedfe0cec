"""OpenAI's own client against a real server: answers are those that gRPC gives."""

from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.e2e.harness import Running, prompt, request
from tests.e2e.openai_client import connect

MODEL = "tiny-chat"
MESSAGES = [{"role": "user", "content": "Name three rivers."}]
PROMPT = "Name three rivers."
LONG = 400
GREEDY = {"temperature": 0.0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(openai_server: Running) -> Iterator[OpenAI]:
    with connect(openai_server) as client:
        yield client


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert model.object == "model"
    assert model.model_extra == {"max_model_len": 2048}
    assert client.models.retrieve(MODEL) == model


def test_a_chat_is_what_grpc_answers(client: OpenAI, openai_server: Running) -> None:
    wanted = openai_server.generate(
        request(messages=[("user", PROMPT)], max_tokens=12, ignore_eos=True)
    )
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=12, **GREEDY
    )
    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert choice.message.role == "assistant"
    assert choice.message.content == wanted.text
    assert choice.finish_reason == "length"
    assert wanted.complete is not None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == wanted.complete.usage.prompt_tokens
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_stream_is_the_whole_in_parts(client: OpenAI) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, **GREEDY}
    whole = client.chat.completions.create(**asked)
    *parts, last = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    assert {part.id for part in parts} == {last.id}
    assert parts[0].object == "chat.completion.chunk"
    assert parts[0].choices[0].delta.role == "assistant"
    assert [part.choices[0].delta.role for part in parts[1:]] == [None] * (len(parts) - 1)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    reasons = [part.choices[0].finish_reason for part in parts]
    assert reasons == [None] * (len(parts) - 1) + ["length"]
    assert [part.usage for part in parts] == [None] * len(parts)
    assert last.choices == []
    assert whole.usage is not None
    assert last.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 12
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_stream_comes_as_it_is_made(client: OpenAI) -> None:
    parts = list(
        client.completions.create(
            model=MODEL, prompt=prompt(20), max_tokens=30, stream=True, logprobs=0, **GREEDY
        )
    )
    tokens = [part.choices[0].logprobs.tokens for part in parts if part.choices[0].logprobs]
    assert sum(len(these) for these in tokens) == 30
    assert len(tokens) > 10, "tokens are sent in steps, not at the end"


@pytest.mark.parametrize("kind", ["text", "ids"])
def test_a_completion_is_what_grpc_answers(
    client: OpenAI, openai_server: Running, kind: str
) -> None:
    ids = prompt(30)
    message = (
        request(ids, max_tokens=8, ignore_eos=True, logprobs=2)
        if kind == "ids"
        else request(text=PROMPT, max_tokens=8, ignore_eos=True, logprobs=2)
    )
    wanted = openai_server.generate(message)
    answer = client.completions.create(
        model=MODEL, prompt=ids if kind == "ids" else PROMPT, max_tokens=8, logprobs=2, **GREEDY
    )
    (choice,) = answer.choices
    assert choice.text == wanted.text
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == pytest.approx([one.logprob for one in wanted.logprobs])
    for top, one in zip(logprobs.top_logprobs, wanted.logprobs, strict=True):
        assert sorted(top.values()) == pytest.approx(sorted(entry.logprob for entry in one.top))
    assert logprobs.text_offset[0] == 0
    widths = [len(token) for token in logprobs.tokens]
    assert logprobs.text_offset == [sum(widths[:index]) for index in range(8)]


def test_logprobs_of_a_chat_are_those_of_its_stream(client: OpenAI) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, **GREEDY}
    asked |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    assert whole is not None
    assert len(whole.content) == 8
    for entry in whole.content:
        assert entry.bytes is not None
        assert bytes(entry.bytes).decode(errors="backslashreplace") == entry.token
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
        assert entry.top_logprobs[1].logprob <= entry.logprob
    parts = [
        part.choices[0].logprobs for part in client.chat.completions.create(**asked, stream=True)
    ]
    streamed = [entry for part in parts if part is not None for entry in part.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole.content]
    assert [e.logprob for e in streamed] == pytest.approx([e.logprob for e in whole.content])


def test_a_stop_string_ends_the_text_before_it(client: OpenAI) -> None:
    asked = {"model": MODEL, "prompt": prompt(20), **GREEDY}
    text = client.completions.create(max_tokens=20, **asked).choices[0].text
    stop = text[8:10]
    choice = client.completions.create(max_tokens=20, stop=stop, **asked).choices[0]
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_completions_have_sixteen_tokens_by_default(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=prompt(20), **GREEDY)
    assert answer.usage.completion_tokens == 16


def test_several_prompts_with_several_choices_each(client: OpenAI) -> None:
    prompts = [prompt(20, seed=1), prompt(25, seed=2)]
    asked = {"model": MODEL, "max_tokens": 6, "seed": 5, "extra_body": {"ignore_eos": True}}
    answer = client.completions.create(prompt=prompts, n=3, temperature=2.0, **asked)
    assert [choice.index for choice in answer.choices] == list(range(6))
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) == 6, "each choice is drawn by itself"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 45
    assert answer.usage.completion_tokens == 36
    again = client.completions.create(prompt=prompts, n=3, temperature=2.0, **asked)
    assert [choice.text for choice in again.choices] == texts, "a seed repeats all choices"


def test_several_choices_stream_side_by_side(client: OpenAI) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 6, "n": 3, "seed": 5}
    asked |= {"temperature": 2.0, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**asked)
    texts, reasons = ["", "", ""], [[], [], []]
    for part in client.chat.completions.create(**asked, stream=True):
        for choice in part.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index].append(choice.finish_reason)
    assert texts == [choice.message.content for choice in whole.choices]
    assert all(each[-1] == "length" and not any(each[:-1]) for each in reasons)


def test_a_prompt_is_cached_for_the_next(client: OpenAI) -> None:
    asked = {"model": MODEL, "prompt": prompt(100, seed=77), "max_tokens": 2, **GREEDY}
    first, second = (client.completions.create(**asked).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == 96


def test_a_sparse_prefill_says_what_it_kept(client: OpenAI) -> None:
    asked = {"model": MODEL, "prompt": prompt(LONG, seed=9), "max_tokens": 4, "temperature": 0}
    answer = client.completions.create(**asked, extra_body={"attention": {"gamma": 0.9}})
    outcome = answer.choices[0].model_extra["csps"]
    report = outcome["attention"]
    assert report["kind"] == "csa"
    assert report["gamma"] == 0.9
    assert 0 < report["density"] <= 1
    assert report["recall_low"] <= report["recall_mean"] <= report["recall_high"]
    assert report["num_probes"] > 0
    times = outcome["timings"]
    assert 0 < times["queued_s"] <= times["first_scheduled_s"] <= times["first_token_s"]
    assert times["first_token_s"] <= times["last_token_s"]
    asked["prompt"] = prompt(LONG, seed=10)
    dense = client.completions.create(**asked, extra_body={"attention": {"kind": "dense"}})
    assert dense.choices[0].model_extra["csps"]["attention"] is None


def test_a_stream_says_how_far_the_prompt_is(client: OpenAI) -> None:
    """In comments, which clients skip."""
    body = {"prompt": prompt(LONG, seed=21), "max_tokens": 3, "stream": True, "ignore_eos": True}
    with client.completions.with_streaming_response.create(
        model=MODEL, prompt="", extra_body=body
    ) as response:
        assert response.headers["content-type"] == "text/event-stream"
        lines = [line for line in response.iter_lines() if line]
    assert lines[0] == ": queued"
    told = [line for line in lines if line.startswith(": prefilled")]
    assert told[-1] == f": prefilled {LONG} of {LONG} tokens"
    assert len(told) > 1, "a prompt of several stages"
    assert lines[-1] == "data: [DONE]"


def test_an_aborted_request_says_so(client: OpenAI, openai_server: Running) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt=prompt(10),
        max_tokens=1500,
        stream=True,
        extra_headers={"X-Request-Id": "mine"},
        **GREEDY,
    )
    first = next(stream)
    assert first.id == "mine"
    assert stream.response.headers["x-request-id"] == "mine"
    openai_server.abort("mine")
    *_, last = stream
    assert last.choices[0].finish_reason == "abort"
