"""What an operator can get wrong: one line that names the flag, status 1, nothing left over."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.checkpoints import edit_json
from tests.e2e.harness import BAD_LOG

TIMEOUT_S = 60.0


def fails(*flags: str) -> str:
    """The last line of `csps serve` with these flags, after checks that it ended well."""
    command = [sys.executable, "-m", "csps", "serve", "--port", "0", *flags]
    # With it Triton runs on CPUs, after a fashion.
    environment = {key: os.environ[key] for key in os.environ if key != "TRITON_INTERPRET"}
    before = ranks()
    end = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    log = end.stdout + end.stderr
    assert end.returncode == 1, log
    assert not [text for text in BAD_LOG if text in log], log
    assert ranks() <= before, "a rank outlives the server"
    error = log.splitlines()[-1]
    assert error.startswith("error: "), log
    return error


def ranks() -> set[int]:
    """Worker processes whose coordinator is gone: PID 1 has taken them over."""
    return {
        process.pid
        for process in psutil.process_iter(["cmdline", "ppid"])
        if process.info["ppid"] == 1 and "--coordinator" in (process.info["cmdline"] or ())
    }


def contains(error: str, parts: Sequence[str]) -> bool:
    return all(part in error for part in parts)


BEFORE_ANY_RANK = {
    "unknown model": (["--model", "/nowhere/llama"], ["/nowhere/llama", "no such"]),
    "tp": (["--workers", "3", "--tp", "2"], ["--tp", "2", "3"]),
    "kv-memory": (["--kv-memory", "lots"], ["--kv-memory", "'lots'", "512MiB"]),
    "negative kv-memory": (["--kv-memory", "-1GiB"], ["--kv-memory"]),
    "gpu memory": (
        ["--gpu-memory-utilization", "90"],
        ["--gpu-memory-utilization: ", "(0, 1]", "90.0"],
    ),
    "no ranks": (["--workers", "0"], ["--workers", "--ranks"]),
    "both kinds of ranks": (["--workers", "1", "--ranks", "1"], ["--workers", "--ranks"]),
    "control": (["--control", "here"], ["--control", "HOST:PORT", "'here'"]),
    "log level": (["--log-level", "LOUD"], ["--log-level", "'LOUD'", "INFO"]),
    "context": (["--max-model-len", "99999999"], ["--max-model-len", "99999999"]),
    "ready file": (
        ["--ready-file", "/nowhere/ready.json"],
        ["--ready-file", "/nowhere/ready.json"],
    ),
    "gamma 0": (["--csa-gamma", "0"], ["--csa-gamma: ", "(0, 1]", "0.0"]),
    "gamma 1.5": (["--csa-gamma", "1.5"], ["--csa-gamma: ", "(0, 1]", "1.5"]),
    "gamma nan": (["--csa-gamma", "nan"], ["--csa-gamma: ", "(0, 1]", "nan"]),
    "min recall": (["--csa-min-recall", "2"], ["--csa-min-recall: ", "[0, 1]", "2.0"]),
    "rows": (["--csa-rows", "0"], ["--csa-rows: ", "[1, 64]", "0"]),
    "window": (["--csa-window", "0"], ["--csa-window: ", "[1, 65536]", "0"]),
    "pipeline": (["--pipeline", "maybe"], ["--pipeline: ", "on or off", "'maybe'"]),
    "tp of sarathi": (
        ["--strategy", "sarathi", "--workers", "4", "--tp", "2"],
        ["--tp", "sarathi", "4", "2"],
    ),
    "sparse by head": (
        ["--strategy", "shift", "--attention", "csa"],
        ["--attention", "csa", "--strategy csps"],
    ),
    "prefill ranks": (
        ["--workers", "2", "--prefill-ranks", "0-2"],
        ["--prefill-ranks", "0 to 1", "0-2"],
    ),
    "decode ranks": (["--decode-ranks", "one"], ["--decode-ranks", "0-2", "'one'"]),
    "tbt target": (["--tbt-target", "-1"], ["--tbt-target: ", "60000", "-1"]),
    "tbt target nan": (["--tbt-target", "nan"], ["--tbt-target: ", "60000", "nan"]),
    "host": (["--host", "300.1.2.3"], ["--port", "300.1.2.3"]),
}


@pytest.mark.parametrize("name", BEFORE_ANY_RANK)
def test_a_wrong_flag(name: str) -> None:
    flags, parts = BEFORE_ANY_RANK[name]
    error = fails(*flags)
    assert contains(error, parts), error


KEY_FILES = {
    "empty": (b"", ["no key"]),
    "comments alone": (b"# s3cret\n\n  \n", ["no key"]),
    "white space within": (b"fine\ns3 cret\n", ["line 2", "white space"]),
    "white space behind": (b"s3cret \n", ["line 1", "white space"]),
    "a tab before": (b"\ts3cret\n", ["line 1", "white space"]),
    "a control character": (b"s3\x07cret\n", ["line 1", "printable ASCII"]),
    "a letter beyond ASCII": ("s3cr\u00e9t\n".encode(), ["line 1", "printable ASCII"]),
    "not UTF-8": (b"s3\xffcret\n", ["byte 2"]),
}


@pytest.mark.parametrize("name", KEY_FILES)
def test_a_file_without_api_keys(name: str, tmp_path: Path) -> None:
    content, parts = KEY_FILES[name]
    file = tmp_path / "keys"
    file.write_bytes(content)
    error = fails("--api-key-file", str(file))
    assert contains(error, ["--api-key-file: ", str(file), *parts]), error
    assert "s3" not in error.replace(str(file), ""), "no part of a key is shown"


def test_no_file_of_api_keys(tmp_path: Path) -> None:
    missing = tmp_path / "keys"
    error = fails("--api-key-file", str(missing))
    assert contains(error, ["--api-key-file: ", str(missing), "No such file"]), error
    error = fails("--api-key-file", str(tmp_path))
    assert contains(error, ["--api-key-file: ", str(tmp_path), "directory"]), error


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        error = fails("--port", port)
        assert contains(error, ["--port", port]), error
        error = fails("--control", f"127.0.0.1:{port}")
        assert contains(error, ["--control", port]), error


def test_a_model_of_another_architecture(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "other")
    config = tmp_path / "other/config.json"
    edit_json(config, architectures=["MambaForCausalLM"], model_type="mamba")
    error = fails("--model", str(tmp_path / "other"))
    assert "MambaForCausalLM" in error, error


def test_weights_that_only_the_ranks_read(tiny: Path, tmp_path: Path) -> None:
    """The ranks find out; the coordinator says it once and ends them."""
    shutil.copytree(tiny, tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").unlink()
    error = fails("--model", str(tmp_path / "broken"), "--workers", "2")
    assert contains(error, ["rank", "failed", "safetensors"]), error


def test_too_little_kv_memory(tiny: Path) -> None:
    error = fails("--model", str(tiny), "--kv-memory", "1KiB")
    assert contains(error, ["rank 0", "--kv-memory", "block of 64 tokens", "bytes"]), error


def test_triton_without_a_gpu(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed or not, the flag and what it lacks are named."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    error = fails("--model", str(tiny), "--workers", "2", "--attention-backend", "triton")
    assert contains(error, ["rank", "failed: --attention-backend: "]), error
    assert "needs a GPU" in error or "is not installed: pip install 'csps[gpu]'" in error, error
