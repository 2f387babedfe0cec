"""Where API keys come from: a file, as all users of a machine can see command lines."""

import os
from pathlib import Path
from typing import Annotated

import typer

from csps.core.errors import ConfigError
from csps.rpc.auth import KEY_FLAG, KEY_VARIABLE

ClientKeyFile = Annotated[
    Path | None,
    typer.Option(
        KEY_FLAG,
        help="For a server that wants an API key: the first in this file. Default: the "
        f"environment variable {KEY_VARIABLE}.",
    ),
]


def read_keys(file: Path) -> tuple[str, ...]:
    """Keys, one a line; blank lines and those that begin with # are skipped.

    ConfigError, which never shows a key, if there is none, one is no key, or the file cannot be
    read.
    """
    try:
        lines = file.read_text("utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"{KEY_FLAG}: {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{KEY_FLAG}: {file}: not UTF-8 at byte {error.start}") from None
    keys = [
        _checked(line, f"{KEY_FLAG}: {file}: line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.startswith("#")
    ]
    if not keys:
        raise ConfigError(f"{KEY_FLAG}: {file}: no key in it")
    return tuple(keys)


def client_key(file: Path | None) -> str:
    """The key a client shows, "" if it was given none. ConfigError as above."""
    if file is not None:
        return read_keys(file)[0]
    key = os.environ.get(KEY_VARIABLE, "")
    return _checked(key, KEY_VARIABLE) if key else ""


def _checked(key: str, where: str) -> str:
    """What a header can carry, and no more."""
    if not all("!" <= character <= "~" for character in key):
        raise ConfigError(f"{where}: a key is printable ASCII without white space")
    return key
