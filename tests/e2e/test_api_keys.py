"""A server with API keys: who shows one gets in, who does not is told how, on both ports."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import openai
import pytest
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from csps.records.rows import Status, read_requests, read_steps
from csps.records.run import RUN_FILE
from csps.rpc.auth import KEY_VARIABLE
from csps.trace.schema import Trace, TraceRequest, write_trace
from csps.v1 import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc
from tests.e2e.harness import RPC_TIMEOUT_S, SERVING, Running, request, serve

FIRST, SECOND, UNKNOWN = "s3cret-of-the-first", "s3cret-of-the-second", "s3cret-of-nobody"
TIMEOUT_S = 120.0
Metadata = tuple[tuple[str, str], ...]
Call = Callable[[grpc.Channel, Metadata], object]


def bearer(key: str) -> Metadata:
    return (("authorization", f"Bearer {key}"),)


KNOWN = {"first": bearer(FIRST), "second": bearer(SECOND)}
# What is shown, and what the answer says.
REFUSED: dict[str, tuple[Metadata, str]] = {
    "none": ((), "no API key: "),
    "another name": ((("x-api-key", FIRST),), "no API key: "),
    "no scheme": ((("authorization", FIRST),), "no API key in the authorization"),
    "another scheme": ((("authorization", f"Basic {FIRST}"),), "no API key in the authorization"),
    "no key": ((("authorization", "Bearer "),), "no API key in the authorization"),
    "unknown": (bearer(UNKNOWN), "the API key is unknown"),
    "a part": (bearer(FIRST[:-1]), "the API key is unknown"),
    "both": (bearer(f"{FIRST} {SECOND}"), "the API key is unknown"),
}


def generate(channel: grpc.Channel, metadata: Metadata) -> object:
    stub = generation_pb2_grpc.GenerationStub(channel)
    return list(
        stub.Generate(request([5, 6], max_tokens=2), timeout=RPC_TIMEOUT_S, metadata=metadata)
    )


def model_info(channel: grpc.Channel, metadata: Metadata) -> object:
    stub = generation_pb2_grpc.GenerationStub(channel)
    asked = generation_pb2.GetModelInfoRequest()
    return stub.GetModelInfo(asked, timeout=RPC_TIMEOUT_S, metadata=metadata)


def watch_steps(channel: grpc.Channel, metadata: Metadata) -> object:
    stub = admin_pb2_grpc.AdminStub(channel)
    asked = admin_pb2.WatchStepsRequest()
    call = stub.WatchSteps(asked, timeout=RPC_TIMEOUT_S, metadata=metadata)
    try:
        return next(iter(call))
    finally:
        call.cancel()


CALLS: dict[str, Call] = {
    "Generate": generate,
    "GetModelInfo": model_info,
    "WatchSteps": watch_steps,
}
METHODS = [
    f"/{service.full_name}/{method.name}"
    for file in (generation_pb2, admin_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny-chat"),
    ("GET", "/v1/nothing"),
]


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"# two teams\n{FIRST}\n\n{SECOND}\n")
    return path


@pytest.fixture(scope="module")
def server(tiny_chat: Path, key_file: Path) -> Iterator[Running]:
    with serve(
        *("--model", str(tiny_chat), "--dtype", "float32", "--http-port", "0"),
        *("--api-key-file", str(key_file), "--log-level", "DEBUG"),
    ) as running:
        yield running
        assert "ready: " in running.log
        assert "s3cret" not in running.log, "after all that the tests have shown"


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("name", KNOWN)
def test_grpc_with_a_key(server: Running, method: str, name: str) -> None:
    assert CALLS[method](server.channel, KNOWN[name])


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("name", REFUSED)
def test_grpc_without(server: Running, method: str, name: str) -> None:
    metadata, problem = REFUSED[name]
    with pytest.raises(grpc.RpcError) as caught:
        CALLS[method](server.channel, metadata)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert problem in caught.value.details()
    assert "s3cret" not in caught.value.details()


def test_grpc_with_two_authorizations(server: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        model_info(server.channel, bearer(FIRST) + bearer(SECOND))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("method", METHODS)
def test_every_method_refuses_before_a_message_has_come(server: Running, method: str) -> None:
    """The call never sends one: a server that waits for it would answer DEADLINE_EXCEEDED."""
    done = threading.Event()

    def never() -> Iterator[Empty]:
        done.wait(RPC_TIMEOUT_S)
        yield from ()

    call = server.channel.stream_stream(method, Empty.SerializeToString, Empty.FromString)
    try:
        with pytest.raises(grpc.RpcError) as caught:
            next(call(never(), timeout=10.0))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    finally:
        done.set()


def test_health_and_reflection_ask_for_none(server: Running) -> None:
    health = health_pb2_grpc.HealthStub(server.channel)
    asked = health_pb2.HealthCheckRequest()
    assert health.Check(asked, timeout=RPC_TIMEOUT_S).status == SERVING
    watch = health.Watch(asked, timeout=RPC_TIMEOUT_S)
    assert next(iter(watch)).status == SERVING
    watch.cancel()
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    (listed,) = stub.ServerReflectionInfo(iter([question]), timeout=RPC_TIMEOUT_S)
    names = {service.name for service in listed.list_services_response.service}
    assert "csps.v1.Generation" in names


def openai_client(server: Running, key: str) -> openai.OpenAI:
    url = server.server.openai_url
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=RPC_TIMEOUT_S)


@pytest.mark.parametrize("key", [FIRST, SECOND])
def test_openai_with_a_key(server: Running, key: str) -> None:
    with openai_client(server, key) as client:
        (model,) = client.models.list().data
        answer = client.chat.completions.create(
            model=model.id, messages=[{"role": "user", "content": "hi"}], max_tokens=2
        )
    assert answer.usage.completion_tokens >= 1


def test_openai_with_an_unknown_key(server: Running) -> None:
    with openai_client(server, UNKNOWN) as client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(
            model="", messages=[{"role": "user", "content": "hi"}], max_tokens=2
        )
    assert isinstance(caught.value, openai.AuthenticationError)
    assert caught.value.code == "invalid_api_key"


def ask(server: Running, method: str, path: str, metadata: Metadata) -> tuple[int, dict, str]:
    """Status, body and how the server wants to be shown a key."""
    connection = HTTPConnection(urlsplit(server.server.openai_url).netloc, timeout=RPC_TIMEOUT_S)
    try:
        connection.request(method, path, headers=dict(metadata))
        answer = connection.getresponse()
        challenge = answer.headers.get("WWW-Authenticate", "")
        return answer.status, json.loads(answer.read()), challenge
    finally:
        connection.close()


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_http_without_a_key(server: Running, method: str, path: str, name: str) -> None:
    metadata, problem = REFUSED[name]
    status, body, challenge = ask(server, method, path, metadata)
    assert status == 401
    assert challenge == "Bearer"
    error = body["error"]
    assert problem in error["message"]
    assert "s3cret" not in str(body)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")


def test_http_health_asks_for_none(server: Running) -> None:
    assert ask(server, "GET", "/health", ()) == (200, {"status": "ok"}, "")


def test_http_refuses_before_the_body_has_come(server: Running) -> None:
    url = urlsplit(server.server.openai_url)
    head = "POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: 1000000\r\n\r\n"
    with socket.create_connection((url.hostname, url.port), timeout=5.0) as connection:
        connection.sendall(head.encode())
        assert connection.recv(1024).startswith(b"HTTP/1.1 401 ")


def csps(*words: str, variable: str = "") -> subprocess.CompletedProcess[str]:
    """A command, with this key in its environment or none."""
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    if variable:
        environment[KEY_VARIABLE] = variable
    return subprocess.run(
        [sys.executable, "-m", "csps", *words],
        stdin=subprocess.DEVNULL,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def submit(server: Running, *flags: str, variable: str = "") -> subprocess.CompletedProcess[str]:
    words = ("--target", server.target, "--prompt", "hi", "--max-tokens", "3", "--ignore-eos")
    return csps("submit", *words, *flags, variable=variable)


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: "), error
    assert all(part in error for part in parts), error
    assert "s3cret" not in error


def test_submit_with_the_variable(server: Running) -> None:
    done = submit(server, variable=SECOND)
    assert done.returncode == 0, done.stderr
    assert "3 output tokens" in done.stderr


def test_submit_with_the_file_which_wins(server: Running, key_file: Path) -> None:
    done = submit(server, "--api-key-file", str(key_file), variable=UNKNOWN)
    assert done.returncode == 0, done.stderr
    assert "3 output tokens" in done.stderr


def test_submit_without_a_key_is_told_how(server: Running) -> None:
    done = submit(server)
    assert_one_line(done, "UNAUTHENTICATED: no API key", "--api-key-file", KEY_VARIABLE)


def test_submit_with_an_unknown_key(server: Running, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(UNKNOWN)
    done = submit(server, "--api-key-file", str(file), variable=FIRST)
    assert_one_line(done, "UNAUTHENTICATED: the API key is unknown")


def test_submit_with_a_file_that_is_not_there(server: Running) -> None:
    done = submit(server, "--api-key-file", "/nowhere/keys", variable=FIRST)
    assert_one_line(done, "--api-key-file: /nowhere/keys: No such file")


def test_replay(server: Running, tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "run"
    write_trace(trace, Trace("one", "a test", 64, (TraceRequest(0.0, 100, 3, (1, 2), session=0),)))
    words = ("replay", str(trace), "--target", server.target, "--out", str(out))
    refused = csps(*words)
    assert_one_line(refused, "UNAUTHENTICATED: no API key", "--api-key-file", KEY_VARIABLE)
    assert not (out / RUN_FILE).exists()
    done = csps(*words, variable=FIRST)
    assert done.returncode == 0, done.stderr
    (row,) = read_requests(out)
    assert row.status is Status.DONE
    assert read_steps(out), "WatchSteps was shown the key too"
    assert "s3cret" not in "".join(file.read_text() for file in out.iterdir())
