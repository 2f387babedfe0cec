"""What goes wrong between OpenAI's client and a server, and what is left of it: nothing."""

import asyncio
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import openai
import pytest
from aiohttp.test_utils import TestClient, TestServer
from openai import OpenAI

from csps.bench.server import ServerProcess
from csps.coordinator.gate import Gate
from csps.coordinator.loop import EngineLoop
from csps.coordinator.openai.app import make_app
from csps.core.attention import DENSE
from csps.engine.runner import Runner
from csps.rpc.auth import ApiKeys
from tests.e2e.harness import Running, eventually, is_idle, prompt, serve, tail
from tests.e2e.in_process import TIMEOUT_S, only, serving
from tests.e2e.openai_client import connect

MODEL = "tiny-chat"
MESSAGES = [{"role": "user", "content": "Name three rivers."}]
NUM_REQUESTS = 100


@pytest.fixture(scope="module")
def client(openai_server: Running) -> Iterator[OpenAI]:
    with connect(openai_server) as client:
        yield client
    assert is_idle(openai_server) or eventually(lambda: is_idle(openai_server))


def chat(client: OpenAI, **fields: object) -> object:
    return client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES} | fields)


def complete(client: OpenAI, **fields: object) -> object:
    return client.completions.create(**{"model": MODEL, "prompt": prompt(10)} | fields)


REFUSED: Mapping[str, tuple[Callable[[OpenAI], object], int, str | None, str | None, str]] = {
    "other model": (
        lambda client: chat(client, model="gpt-x"),
        *(404, "model", "model_not_found", "'gpt-x' is not served, 'tiny-chat' is"),
    ),
    "no such model": (
        lambda client: client.models.retrieve("gpt-x"),
        *(404, "model", "model_not_found", "'gpt-x'"),
    ),
    "limits are those of every protocol": (
        lambda client: chat(client, temperature=101),
        *(400, "temperature", None, "[0, 100]"),
    ),
    "seed": (lambda client: chat(client, seed=-1, n=2), *(400, "seed", None, "[0, 2^63)")),
    "form": (
        lambda client: chat(client, messages=[{"role": "user", "content": 5}]),
        *(400, "messages[0].content", None, "got 5"),
    ),
    "role": (
        lambda client: chat(client, messages=[{"role": "wizard", "content": "a"}]),
        *(400, "messages", None, "wizard"),
    ),
    "not served": (
        lambda client: chat(client, presence_penalty=1.0),
        *(400, "presence_penalty", None, "not supported"),
    ),
    "long prompt": (
        lambda client: complete(client, prompt=prompt(2048)),
        *(400, "prompt", "context_length_exceeded", "2048"),
    ),
    "long text": (
        lambda client: complete(client, prompt="x" * 200_000),
        *(400, "text", "context_length_exceeded", "131072"),
    ),
    "long answer": (
        lambda client: complete(client, max_tokens=2040),
        *(400, "max_tokens", "context_length_exceeded", "2048"),
    ),
    "many choices": (
        lambda client: complete(client, prompt=["a"] * 65, n=2),
        *(400, "n", None, "130 choices"),
    ),
    "one bad prompt of several": (
        lambda client: complete(client, prompt=[[5], [400]]),
        *(400, "token_ids", None, "[0, 400)"),
    ),
    "no such path": (
        lambda client: client.embeddings.create(model=MODEL, input="a"),
        *(404, None, None, "/v1/embeddings"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(client: OpenAI, name: str) -> None:
    call, status, param, code, needle = REFUSED[name]
    with pytest.raises(openai.APIStatusError) as caught:
        call(client)
    error = caught.value
    assert error.status_code == status
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    assert needle in error.message


def test_an_id_is_taken_while_its_request_lives(client: OpenAI, openai_server: Running) -> None:
    named = {"extra_headers": {"X-Request-Id": "twice"}}
    stream = complete(client, stream=True, max_tokens=1500, **named)
    next(stream)
    with pytest.raises(openai.ConflictError, match="'twice' is live already"):
        complete(client, **named)
    openai_server.abort("twice")
    list(stream)
    complete(client, max_tokens=2, **named)


def flood(client: OpenAI) -> list[openai.RateLimitError | int]:
    """What comes of 12 prompts of 250 tokens at once, where 900 may wait."""

    def go(seed: int) -> openai.RateLimitError | int:
        try:
            fields = {"prompt": prompt(250, seed=seed), "extra_body": {"ignore_eos": True}}
            return complete(client, max_tokens=40, **fields).usage.completion_tokens
        except openai.RateLimitError as error:
            return error

    with ThreadPoolExecutor(12) as pool:
        return list(pool.map(go, range(12)))


def test_a_full_queue_says_when_to_come_back(client: OpenAI) -> None:
    ends = flood(client)
    errors = [end for end in ends if not isinstance(end, int)]
    assert errors
    assert all(end == 40 for end in ends if isinstance(end, int))
    for error in errors:
        assert "900" in error.message
        assert error.type == "rate_limit_error"
        assert int(error.response.headers["retry-after"]) > 0


def test_a_client_that_comes_back_is_served(openai_server: Running) -> None:
    with connect(openai_server, max_retries=10) as client:
        assert flood(client) == [40] * 12


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_ends_its_request(
    client: OpenAI, openai_server: Running, stream: bool
) -> None:
    with connect(openai_server) as leaving:
        fields = {"prompt": prompt(100), "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
        if stream:
            answer = complete(leaving, stream=True, **fields)
            next(answer)
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                complete(leaving, timeout=0.5, **fields)
    assert eventually(lambda: is_idle(openai_server))


def test_a_port_in_use_is_named(tiny: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = ServerProcess("--model", str(tiny), "--http-port", str(port))
        server.start()
        try:
            assert server.process.wait(TIMEOUT_S) == 1
            last = server.log.splitlines()[-1]
            assert f"--http-port: cannot listen on 127.0.0.1:{port}" in last
        finally:
            server.__exit__(None, None, None)


class Reader(threading.Thread):
    """A stream of very many tokens, read until it ends."""

    def __init__(self, client: OpenAI) -> None:
        super().__init__(daemon=True)
        self.begun = threading.Event()
        self.error: openai.APIError | None = None
        self.finish: str | None = None
        self._stream = complete(
            client, stream=True, max_tokens=1900, extra_body={"ignore_eos": True}
        )
        self.start()

    def run(self) -> None:
        try:
            for part in self._stream:
                self.begun.set()
                self.finish = part.choices[0].finish_reason
        except openai.APIError as error:
            self.error = error


@pytest.mark.parametrize("how", ["stopped", "rank lost"])
def test_the_end_of_a_server_is_told_to_its_streams(tiny_chat: Path, how: str) -> None:
    with serve(
        *("--model", str(tiny_chat), "--workers", "2", "--dtype", "float32", "--http-port", "0")
    ) as server:
        with connect(server) as client:
            readers = [Reader(client) for _ in range(2)]
            for reader in readers:
                assert reader.begun.wait(TIMEOUT_S)
            if how == "stopped":
                server.signal(signal.SIGTERM)
                with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
                    assert eventually(lambda: complete(client, max_tokens=1) is None)
            else:
                server.ranks[1].kill()
            for reader in readers:
                reader.join(TIMEOUT_S)
                assert not reader.is_alive(), "a stream hangs"
                if how == "stopped" and reader.finish == "length":
                    continue  # a fast machine: it was done in the time that it got
                assert reader.error is not None
                needle = "stopping" if how == "stopped" else "rank 1"
                assert needle in reader.error.message
        assert server.wait_exit() == (0 if how == "stopped" else 1), tail(server.log)


def test_before_the_ranks_are_there_nothing_is_served() -> None:
    async def scenario() -> None:
        async with TestClient(TestServer(make_app(Gate(), DENSE, ApiKeys(())))) as client:
            assert (await client.get("/health")).status == 503
            for answer in (
                await client.get("/v1/models"),
                await client.post("/v1/chat/completions", json={"messages": MESSAGES}),
            ):
                assert answer.status == 503
                assert "starting" in (await answer.json())["error"]["message"]

    asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))


async def one_request(session: aiohttp.ClientSession, url: str, number: int) -> None:
    """Left at a random moment, mostly early, by most; with one to three choices."""
    source = random.Random(number)
    body = {
        "prompt": prompt(source.choice([3, 100, 600]), seed=number),
        "max_tokens": 20,
        "ignore_eos": True,
        "stream": bool(number % 3),
        "n": source.choice([1, 1, 3]),
    }
    stay_s = source.expovariate(1 / source.choice([0.001, 0.05, 0.2])) if number % 10 else TIMEOUT_S
    try:
        async with asyncio.timeout(stay_s), session.post(f"{url}/completions", json=body) as answer:
            await answer.read()
    except TimeoutError:
        pass


async def churn(model: Path, store: Path) -> None:
    async with (
        serving(model, store, http_port=0) as (server, _),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        await one_request(session, server.openai_url, 0)
        async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
            for number in range(NUM_REQUESTS):
                group.create_task(one_request(session, server.openai_url, number))
        loop, runner = only(EngineLoop), only(Runner)
        for _ in range(100):
            if not loop.num_live and not runner._states:
                break
            await asyncio.sleep(0.05)
        assert loop.num_live == 0
        assert runner._states == {}, "the rank remembers sequences that have ended"
        loop.scheduler.check_integrity()
        assert loop.scheduler.kv_usage == 0.0
        names = [task.get_coro().__qualname__ for task in asyncio.all_tasks()]
        assert [name for name in names if "Answer" in name or "kept_alive" in name] == []


def test_requests_left_at_any_moment_leave_nothing(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asyncio.run(churn(tiny, tmp_path / "store"))
    bad = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert bad == []
