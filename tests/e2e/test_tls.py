"""A server with TLS and API keys: who trusts its certificate gets in, on both ports."""

import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import openai
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from csps.records.rows import Status, read_requests
from csps.rpc.auth import KEY_VARIABLE
from csps.trace.schema import Trace, TraceRequest, write_trace
from csps.v1 import generation_pb2, generation_pb2_grpc
from tests.e2e.harness import CHANNEL_OPTIONS, RPC_TIMEOUT_S, SERVING, serve
from tests.e2e.test_bad_flags import contains, fails

API_KEY = "the-api-key"
TIMEOUT_S = 60.0
NAMES = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Files:
    """In PEM. `stranger`: an authority that has nothing to do with the server."""

    ca: Path
    certificate: Path
    key: Path
    stranger: Path
    api_keys: Path


@dataclass(frozen=True)
class Secure:
    """A server with TLS, started once for all tests."""

    target: str
    openai_url: str
    files: Files

    @property
    def http(self) -> str:
        return urlsplit(self.openai_url).netloc


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tls")
    found = Files(*(folder / name for name in ("ca", "certificate", "key", "stranger", "api_keys")))
    authority = trustme.CA()
    authority.cert_pem.write_to_path(found.ca)
    issued = authority.issue_cert(*NAMES)
    found.certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(found.key)
    trustme.CA().cert_pem.write_to_path(found.stranger)
    found.api_keys.write_text(API_KEY)
    return found


@pytest.fixture(scope="module")
def secure(tiny_chat: Path, files: Files) -> Iterator[Secure]:
    with serve(
        *("--model", str(tiny_chat), "--dtype", "float32", "--http-port", "0"),
        *("--tls-cert", str(files.certificate), "--tls-key", str(files.key)),
        *("--api-key-file", str(files.api_keys), "--log-level", "DEBUG"),
    ) as running:
        server = Secure(running.target, running.server.openai_url, files)
        yield server
        assert f"OpenAI's protocol at {server.openai_url}" in running.log
        # One line of the key's: its text must not be anywhere.
        assert files.key.read_text().splitlines()[1] not in running.log
        assert "ssl_transport_security" not in running.log, "of the clients that did not get in"


def check(channel: grpc.Channel) -> int:
    """What health says, over this channel, which is closed."""
    with channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(), timeout=RPC_TIMEOUT_S).status


def secure_channel(target: str, authority: Path) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(authority.read_bytes())
    return grpc.secure_channel(target, credentials, options=CHANNEL_OPTIONS)


def test_grpc_with_its_authority(secure: Secure) -> None:
    assert check(secure_channel(secure.target, secure.files.ca)) == SERVING
    with secure_channel(secure.target, secure.files.ca) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        asked = generation_pb2.GetModelInfoRequest()
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetModelInfo(asked, timeout=RPC_TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", f"Bearer {API_KEY}"),)
        answer = stub.GetModelInfo(asked, timeout=RPC_TIMEOUT_S, metadata=metadata)
        assert answer.model == "tiny-chat"


def test_grpc_with_another_authority(secure: Secure) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        check(secure_channel(secure.target, secure.files.stranger))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "CERTIFICATE_VERIFY_FAILED" in caught.value.details()


def test_grpc_in_clear_text(secure: Secure) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        check(grpc.insecure_channel(secure.target, options=CHANNEL_OPTIONS))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def openai_client(secure: Secure, authority: Path) -> openai.OpenAI:
    context = ssl.create_default_context(cafile=authority)
    return openai.OpenAI(
        base_url=secure.openai_url,
        api_key=API_KEY,
        max_retries=0,
        timeout=RPC_TIMEOUT_S,
        http_client=openai.DefaultHttpxClient(verify=context),
    )


def test_openai(secure: Secure) -> None:
    assert secure.openai_url.startswith("https://127.0.0.1:")
    with openai_client(secure, secure.files.ca) as client:
        stream = client.chat.completions.create(
            model="tiny-chat",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=4,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        *_, last = stream
        assert last.choices[0].finish_reason == "length"


def test_openai_with_another_authority(secure: Secure) -> None:
    with (
        openai_client(secure, secure.files.stranger) as client,
        pytest.raises(openai.APIConnectionError) as caught,
    ):
        client.models.list()
    assert "CERTIFICATE_VERIFY_FAILED" in str(caught.value.__cause__)


def test_http_health(secure: Secure) -> None:
    context = ssl.create_default_context(cafile=secure.files.ca)
    connection = HTTPSConnection(secure.http, timeout=RPC_TIMEOUT_S, context=context)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b'{"status": "ok"}')
    finally:
        connection.close()


def test_http_in_clear_text(secure: Secure) -> None:
    connection = HTTPConnection(secure.http, timeout=RPC_TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        with pytest.raises(ConnectionError):
            connection.getresponse()
    finally:
        connection.close()


def csps(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A client's command, with the API key."""
    # As users have it: neither gRPC's roots nor its log are chosen.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    return subprocess.run(
        [sys.executable, "-m", "csps", *words],
        stdin=subprocess.DEVNULL,
        env=kept | {KEY_VARIABLE: API_KEY} | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def submit(target: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    words = ("--target", target, "--prompt", "hi", "--max-tokens", "3", "--ignore-eos")
    return csps("submit", *words, *flags, **environment)


def assert_answers(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert "3 output tokens" in done.stderr


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: "), error
    assert contains(error, parts), error


def test_submit_with_the_authority(secure: Secure) -> None:
    ca = str(secure.files.ca)
    assert_answers(submit(secure.target, "--tls-ca", ca))
    assert_one_line(submit(secure.target, "--tls-ca", ca, CSPS_API_KEY="other"), "UNAUTHENTICATED")


def test_submit_with_the_systems_authorities(secure: Secure) -> None:
    """OpenSSL's own variable says where they are."""
    assert_answers(submit(secure.target, "--tls", SSL_CERT_FILE=str(secure.files.ca)))
    refused = submit(secure.target, "--tls", SSL_CERT_FILE=str(secure.files.stranger))
    assert_one_line(refused, f"the certificate of {secure.target} is not trusted", "--tls-ca FILE")


def test_submit_with_another_authority(secure: Secure) -> None:
    refused = submit(secure.target, "--tls-ca", str(secure.files.stranger))
    assert_one_line(refused, f"the certificate of {secure.target} is not trusted", "--tls-ca FILE")


def test_submit_to_another_name(secure: Secure) -> None:
    """The system finds this one to be the same address, the certificate does not have it."""
    target = secure.target.replace("127.0.0.1", "0.0.0.0")
    refused = submit(target, "--tls-ca", str(secure.files.ca))
    assert_one_line(refused, f"the certificate of {target} is for another name")


def test_submit_in_clear_text(secure: Secure) -> None:
    refused = submit(secure.target)
    assert_one_line(refused, secure.target, "if it speaks TLS, add --tls-ca FILE or --tls")


def test_submit_with_tls_to_a_port_without(files: Files) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        refused = submit(target, "--tls-ca", str(files.ca))
    finally:
        server.stop(None).wait()
    assert_one_line(refused, f"{target} speaks no TLS", "--tls-ca and --tls")


def test_submit_with_a_file_that_is_no_authority(files: Files) -> None:
    refused = submit("127.0.0.1:1", "--tls-ca", str(files.key))
    assert_one_line(refused, f"--tls-ca: {files.key}: no certificate in PEM")


def test_replay(secure: Secure, tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "run"
    write_trace(trace, Trace("one", "a test", 64, (TraceRequest(0.0, 100, 3, (1, 2), session=0),)))
    words = ("replay", str(trace), "--target", secure.target, "--out", str(out))
    assert_one_line(csps(*words), "if it speaks TLS, add --tls-ca FILE or --tls")
    done = csps(*words, "--tls-ca", str(secure.files.ca))
    assert done.returncode == 0, done.stderr
    (row,) = read_requests(out)
    assert row.status is Status.DONE


def test_serve_with_one_flag_of_two(files: Files) -> None:
    error = fails("--tls-key", str(files.key))
    assert contains(error, ["--tls-key: needs --tls-cert"]), error


def test_serve_with_the_key_of_another(files: Files, tmp_path: Path) -> None:
    other = tmp_path / "other"
    trustme.CA().issue_cert(*NAMES).private_key_pem.write_to_path(other)
    error = fails("--tls-cert", str(files.certificate), "--tls-key", str(other))
    assert contains(error, [f"--tls-key: {other}: not the key of", str(files.certificate)]), error
