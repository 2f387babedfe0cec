"""`csps submit` as a user runs it."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Running, eventually, is_idle, serve

CSPS = (sys.executable, "-m", "csps")


@pytest.fixture(scope="module")
def server(tiny_chat: Path) -> Iterator[Running]:
    with serve("--model", str(tiny_chat), "--dtype", "float32") as running:
        yield running


def submit(target: str, *flags: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [*CSPS, "submit", "--target", target, *flags]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120, check=False)


def test_document_and_question(server: Running, tmp_path: Path) -> None:
    document, report = tmp_path / "doc.txt", tmp_path / "report.json"
    document.write_text("the cat sat on the mat. " * 20)
    done = submit(
        server.target,
        *("--file", str(document), "--prompt", "Who sat?", "--max-tokens", "9"),
        *("--ignore-eos", "--logprobs", "1", "--prompt-logprobs", "3", "--json", str(report)),
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(report.read_text())
    assert done.stdout.decode().strip("\n") == answer["text"].strip("\n")
    assert len(answer["token_ids"]) == len(answer["logprobs"]) == 9
    assert len(answer["prompt_logprobs"]) == 3
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["output_tokens"] == answer["timings"]["output_tokens"] == 9
    assert 0 < answer["timings"]["first_token_s"] <= answer["timings"]["last_token_s"]
    assert b"TTFT" in done.stderr
    assert b"9 output tokens" in done.stderr


def test_standard_input_and_raw(server: Running) -> None:
    flags = ("--max-tokens", "5", "--ignore-eos")
    piped = submit(server.target, *flags, "--raw", stdin=b"the cat")
    given = submit(server.target, *flags, "--raw", "--prompt", "the cat")
    assert piped.returncode == given.returncode == 0, piped.stderr
    assert piped.stdout == given.stdout


@pytest.mark.parametrize(
    ("flags", "stdin", "message"),
    [
        (("--prompt", "hi", "--temperature", "-1"), b"", "temperature: must be in"),
        (("--prompt", "hi", "--max-tokens", "0"), b"", "max_tokens: must be at least 1"),
        (("--file", "/nonexistent"), b"", "--file: /nonexistent: No such file"),
        ((), b"\xff\xfe", "standard input: not UTF-8 at byte 0"),
        ((), b"", "--prompt, --file: give one of them"),
    ],
)
def test_errors_are_one_line(server: Running, flags, stdin, message) -> None:
    done = submit(server.target, *flags, stdin=stdin)
    assert done.returncode == 1
    assert message in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert done.stdout == b""


def test_no_server() -> None:
    done = submit("127.0.0.1:1", "--prompt", "hi")
    assert done.returncode == 1
    assert b"no server answers at 127.0.0.1:1" in done.stderr


def test_a_model_without_a_chat_template(two_ranks: Running) -> None:
    done = submit(two_ranks.target, "--prompt", "hi")
    assert done.returncode == 1
    assert b"add --raw" in done.stderr


def test_interrupt_cancels_the_request(server: Running) -> None:
    flags = ("--raw", "--prompt", "the cat", "--ignore-eos", "--max-tokens", "2000")
    command = [*CSPS, "submit", "--target", server.target, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert eventually(lambda: server.load().num_running == 1, timeout=60)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert b"Traceback" not in process.stderr.read()
    assert eventually(lambda: is_idle(server))
