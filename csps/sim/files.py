"""Reads the TOML files of the simulator: shipped ones by name, any other by path."""

import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from csps.core.errors import ConfigError


class Table:
    """One table of a file. Errors name the file and the key."""

    def __init__(self, values: Mapping[str, Any], origin: str, path: str = "") -> None:
        self.values = values
        self._origin = origin
        self._path = path

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self._origin}: {self._path}{key}: {problem}")

    def table(self, key: str) -> "Table":
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "expected a table")
        return Table(value, self._origin, f"{self._path}{key}.")

    def tables(self, key: str) -> list["Table"]:
        values = self.values.get(key)
        if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
            raise self.error(key, "expected tables")
        return [
            Table(value, self._origin, f"{self._path}{key}[{i}].") for i, value in enumerate(values)
        ]

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not value:
            raise self.error(key, f"expected text, got {value!r}")
        return value

    def number(self, key: str, least: float = 0.0, most: float = float("inf")) -> float:
        value = self.values.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(key, f"expected a number, got {value!r}")
        if not least <= value <= most:  # NaN fails too
            raise self.error(key, f"must be in [{least:g}, {most:g}], got {value:g}")
        return float(value)

    def integer(self, key: str, least: int = 0) -> int:
        value = self.values.get(key)
        if type(value) is not int or value < least:
            raise self.error(key, f"expected an integer, at least {least}, got {value!r}")
        return value


def shipped(folder: str) -> list[str]:
    """Names of the files in a folder of this package."""
    files = resources.files("csps.sim").joinpath(folder).iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def read_table(flag: str, folder: str, name: str) -> Table:
    """The file called `name` in a folder of this package, or at the path `name`.

    ConfigError names `flag` and the known names if there is none, and the line of bad TOML.
    """
    if name in shipped(folder):
        text = resources.files("csps.sim").joinpath(folder, f"{name}.toml").read_text("utf-8")
        return _parse(text, name)
    path = Path(name)
    if not path.is_file():
        known = ", ".join(shipped(folder))
        raise ConfigError(f"{flag}: there is no file {name}; known by name: {known}")
    try:
        return _parse(path.read_text("utf-8"), name)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag}: {name}: {error}") from None


def _parse(text: str, origin: str) -> Table:
    try:
        return Table(tomllib.loads(text), origin)
    except tomllib.TOMLDecodeError as error:  # says the line
        raise ConfigError(f"{origin}: {error}") from None
