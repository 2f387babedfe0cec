"""API keys: what passes, what a file of them may hold, and that nothing shows one."""

from pathlib import Path

import pytest

from csps.cli.api_keys import client_key, read_keys
from csps.core.config import ServerConfig, WorkerSetup
from csps.core.errors import ConfigError, UnauthenticatedError
from csps.core.request import SamplingParams
from csps.replay.run import ReplayConfig
from csps.rpc.auth import KEY_VARIABLE, ApiKeys, authorization
from csps.submit import Submission

FIRST, SECOND = "first-s3cret", "s3cond!~"


@pytest.mark.parametrize(
    "shown",
    [
        f"Bearer {FIRST}",
        f"Bearer {SECOND}",
        f"bearer {FIRST}",
        f"  Bearer   {FIRST} ",
        authorization(SECOND)[0][1],
    ],
)
def test_a_key_of_several(shown: str) -> None:
    ApiKeys([FIRST, SECOND]).check([shown])


@pytest.mark.parametrize(
    ("shown", "problem"),
    [
        ([], "no API key: "),
        (["Bearer"], "no API key in"),
        (["Bearer "], "no API key in"),
        ([FIRST], "no API key in"),
        ([f"Basic {FIRST}"], "no API key in"),
        ([f"Bearer {FIRST}", f"Bearer {FIRST}"], "no API key in"),
        ([f"Bearer {FIRST[:-1]}"], "unknown"),
        ([f"Bearer {FIRST}0"], "unknown"),
        ([f"Bearer {FIRST} {SECOND}"], "unknown"),
        ([f"Bearer {FIRST.upper()}"], "unknown"),
        (["Bearer s3cr\u00e9t"], "unknown"),
        (["Bearer s3cret\udcff"], "unknown"),
    ],
)
def test_anything_else(shown: list[str], problem: str) -> None:
    with pytest.raises(UnauthenticatedError) as caught:
        ApiKeys([FIRST, SECOND]).check(shown)
    text = str(caught.value)
    assert problem in text
    assert "s3c" not in text
    says_how = all(part in text for part in ("Bearer KEY", "--api-key-file", KEY_VARIABLE))
    assert says_how == (problem != "unknown")


def test_no_keys_ask_nobody() -> None:
    ApiKeys([]).check([])
    ApiKeys([]).check(["Basic of-a-proxy"])
    assert authorization("") == ()


def test_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(f"# of the \u00e9quipe\r\n\r\n{FIRST}\r\n \n#{FIRST}0\n{SECOND}".encode())
    assert read_keys(file) == (FIRST, SECOND)


def test_the_flag_wins_over_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{SECOND}\n{FIRST}\n")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert client_key(None) == ""
    assert client_key(file) == SECOND
    monkeypatch.setenv(KEY_VARIABLE, FIRST)
    assert client_key(None) == FIRST
    assert client_key(file) == SECOND


@pytest.mark.parametrize("key", ["s3cret\n", "s3 cret", "s3cr\u00e9t", " "])
def test_a_variable_that_is_no_key(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ConfigError, match=f"^{KEY_VARIABLE}: ") as caught:
        client_key(None)
    assert "s3" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        ServerConfig(WorkerSetup("m"), api_keys=(FIRST, SECOND)),
        Submission("here:1", "hi", SamplingParams(), api_key=FIRST),
        ReplayConfig("here:1", Path("out"), api_key=FIRST),
        ApiKeys([FIRST, SECOND]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_nothing_prints_a_key(config: object) -> None:
    assert "s3c" not in f"{config!r} {config}"
