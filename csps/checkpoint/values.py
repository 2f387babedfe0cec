"""Typed reading of loosely typed checkpoint metadata; every error names the file and the key."""

from collections.abc import Mapping

from csps.core.errors import CheckpointError


class Values:
    """A mapping from a model file. A null value counts as absent, as it does in transformers.

    The getters without a default raise CheckpointError if the key is absent; all raise it if
    the value has the wrong type.
    """

    def __init__(self, source: str, values: Mapping[str, object]) -> None:
        self.source = source
        self._values = values

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def get(self, key: str) -> object:
        """The value as it is, or None."""
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._present(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "an integer")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        """An integer of at least 1."""
        value = self.integer(key, default)
        if value < 1:
            raise self.wrong(key, "at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._present(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        return self.number(key) if key in self else None

    def flag(self, key: str, default: bool) -> bool:
        value = self._present(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._present(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def items(self, key: str) -> list[object]:
        """A list; a single value counts as a list of one, an absent key as an empty one."""
        value = self._values.get(key)
        if value is None:
            return []
        return list(value) if isinstance(value, list) else [value]

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them; () if absent."""
        ids = []
        for value in self.items(key):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise self.wrong(key, "a token id or a list of token ids")
            ids.append(value)
        return tuple(ids)

    def section(self, key: str) -> "Values":
        """A nested mapping; an absent one is empty."""
        value = self._values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.wrong(key, "a mapping")
        return Values(f"{self.source}: {key}", value)

    def nested(self) -> tuple[str, ...]:
        """Keys whose values are themselves mappings."""
        return tuple(key for key, value in self._values.items() if isinstance(value, dict))

    def wrong(self, key: str, wanted: str) -> CheckpointError:
        """The error for a value that is not what is wanted."""
        return CheckpointError(
            f"{self.source}: {key} must be {wanted}, got {self._values.get(key)!r}"
        )

    def unsupported(self, key: str, supported: str) -> CheckpointError:
        """The error for a value that is understood but cannot be served."""
        return CheckpointError(
            f"{self.source}: {key} {self._values.get(key)!r} is not supported "
            f"(supported: {supported})"
        )

    def _present(self, key: str, default: object) -> object:
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.source}: {key} is missing")
        return value
