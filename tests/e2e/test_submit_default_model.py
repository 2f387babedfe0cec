"""What `csps submit` sends, reports and leaves behind, with the default model."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from csps.checkpoint.chat import ChatMessage, load_chat_template
from csps.checkpoint.locate import DEFAULT_MODEL, locate
from csps.checkpoint.tokenizer import load_tokenizer
from tests.e2e.harness import Running, eventually, is_idle, serve

DOCUMENT = "The lighthouse keeper's name is Ebenezer.\nHe has two cats.\n"
QUESTION = "What is the lighthouse keeper's name?"
ENDLESS = ("--ignore-eos", "--max-tokens", "5000")
TIMEOUT_S = 180


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    flags = ["--dtype", "float32", "--threads-per-rank", "1", "--kv-memory", "1GiB"]
    with serve(*flags, "--log-level", "WARNING") as running:
        yield running


@pytest.fixture
def target(server: Running) -> str:
    return server.target


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT)
    return path


def command(target: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "csps", "submit", "--target", target, *arguments]


def submit(
    target: str, *arguments: str, stdin: str | None = None
) -> "subprocess.CompletedProcess[str]":
    source = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run(
        command(target, *arguments),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
        **source,
    )


def assert_one_line_error(done: "subprocess.CompletedProcess[str]", *parts: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr


def test_a_document_and_a_question(target: str, document: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    flags = ["--file", str(document), "--prompt", QUESTION, "--max-tokens", "24"]
    done = submit(target, *flags, "--json", str(report))
    assert done.returncode == 0, done.stderr
    assert "Ebenezer" in done.stdout
    assert "prompt tokens" in done.stderr
    assert ", TTFT" in done.stderr
    assert "TBT p50" in done.stderr
    assert done.stderr.count("\n") == 1

    answer = json.loads(report.read_text())
    assert done.stdout == answer["text"] + "\n"
    assert answer["error"] is None
    assert answer["finish_reason"] == "stop"
    checkpoint = locate(DEFAULT_MODEL)
    tokenizer = load_tokenizer(checkpoint)
    rendered = load_chat_template(checkpoint).render(
        [ChatMessage("user", f"{DOCUMENT}\n\n{QUESTION}")]
    )
    prompt_ids = tokenizer.encode(rendered, add_special_tokens=False)
    num_output = len(answer["token_ids"])
    usage = answer["usage"]
    assert usage.pop("cached_tokens") < len(prompt_ids)
    assert usage == {"prompt_tokens": len(prompt_ids), "output_tokens": num_output}
    assert answer["timings"]["output_tokens"] == num_output
    times = [answer["timings"][f"{name}_s"] for name in ("queued", "first_scheduled")]
    times += [answer["timings"][f"{name}_s"] for name in ("first_token", "last_token")]
    assert times == sorted(times)
    assert times[0] > 0
    assert answer["client_ttft_s"] > 0
    assert len(answer["tbt_ms"]) == num_output - 1
    assert answer["tbt_ms_p50"] <= answer["tbt_ms_p99"] <= max(answer["tbt_ms"])


def test_standard_input_is_the_same_as_a_file(target: str, document: Path) -> None:
    flags = ["--prompt", QUESTION, "--max-tokens", "8"]
    from_file = submit(target, "--file", str(document), *flags)
    from_pipe = submit(target, "--file", "-", *flags, stdin=DOCUMENT)
    piped_alone = submit(target, "--max-tokens", "8", stdin=f"{DOCUMENT}\n\n{QUESTION}")
    assert from_file.returncode == 0
    assert from_file.stdout
    assert from_pipe.stdout == from_file.stdout
    assert piped_alone.stdout == from_file.stdout


def test_raw_text_with_logprobs_and_a_stop_string(target: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    text = "Monday, Tuesday, Wednesday,"
    flags = ["--raw", "--prompt", text, "--max-tokens", "6", "--json", str(report)]
    assert submit(target, *flags).returncode == 0
    whole = json.loads(report.read_text())["text"]
    stop = whole[4:9]
    done = submit(target, *flags, "--stop", stop, "--logprobs", "2")
    assert done.returncode == 0, done.stderr
    answer = json.loads(report.read_text())
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["finish_reason"] == "stop"
    tokenizer = load_tokenizer(locate(DEFAULT_MODEL))
    num_prompt = len(tokenizer.encode(text, add_special_tokens=True))
    assert answer["usage"]["prompt_tokens"] == num_prompt
    assert len(answer["logprobs"]) == len(answer["token_ids"])
    for token_id, entry in zip(answer["token_ids"], answer["logprobs"], strict=True):
        assert entry["top"][0] == [token_id, entry["logprob"]]  # greedy draws the likeliest
        assert entry["top"][0][1] >= entry["top"][1][1]


def test_a_system_message_is_part_of_the_prompt(target: str, tmp_path: Path) -> None:
    def num_prompt_tokens(*flags: str) -> int:
        report = tmp_path / "report.json"
        submit(target, "--prompt", "Hello", "--max-tokens", "1", "--json", str(report), *flags)
        return int(json.loads(report.read_text())["usage"]["prompt_tokens"])

    assert num_prompt_tokens("--system", "Hm") < num_prompt_tokens("--system", "Hm " * 40)


def test_the_servers_refusal_is_one_line(target: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = submit(target, "--prompt", "hi", "--temperature", "-1", "--json", str(report))
    assert_one_line_error(done, "INVALID_ARGUMENT: temperature: must be in [0, 100], got -1")
    answer = json.loads(report.read_text())
    assert answer["error"].startswith("INVALID_ARGUMENT: temperature")
    assert answer["token_ids"] == []
    assert answer["finish_reason"] is None


def test_errors_before_anything_is_sent_are_one_line(target: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"ab\xffcd")
    assert_one_line_error(submit(target, "--file", str(bad)), "bad.txt: not UTF-8 at byte 2")
    assert_one_line_error(submit(target), "--prompt, --file: give one of them")
    too_large = submit(target, "--prompt", "hi", "--max-tokens", str(2**40))
    assert_one_line_error(too_large, "request: cannot be sent: ")
    nowhere = submit(target, "--prompt", "hi", "--json", str(tmp_path / "absent" / "x.json"))
    assert_one_line_error(nowhere, "--json: ", "No such file or directory")


def test_a_deadline_ends_the_request(server: Running) -> None:
    done = submit(server.target, "--prompt", "Count.", *ENDLESS, "--timeout", "2")
    assert done.returncode == 1
    assert "error: DEADLINE_EXCEEDED" in done.stderr
    assert "Traceback" not in done.stderr
    assert eventually(lambda: is_idle(server))


def test_ctrl_c_cancels_and_exits_130(server: Running, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    flags = ["--prompt", "Count.", *ENDLESS, "--json", str(report)]
    with subprocess.Popen(
        command(server.target, *flags),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1)  # it streams
            assert server.load().num_running == 1
            process.send_signal(signal.SIGINT)
            _, log = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in log
    assert eventually(lambda: is_idle(server))
    answer = json.loads(report.read_text())
    assert answer["error"] == "cancelled"
    assert answer["token_ids"]


def test_a_reader_that_goes_away_ends_the_request(server: Running) -> None:
    with subprocess.Popen(
        command(server.target, "--prompt", "Count.", *ENDLESS),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1)
            process.stdout.close()
            assert process.wait(30) == 1
        finally:
            process.kill()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert eventually(lambda: is_idle(server))
