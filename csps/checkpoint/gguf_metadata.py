"""Header of a GGUF file: metadata and where each tensor lies, without touching the weights.

Format: ggml's docs/gguf.md, versions 2 and 3, little-endian. Parsed here rather than with
`gguf.GGUFReader`, which makes a numpy view per string: seconds for a 150,000-token vocabulary.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from csps.core.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_STRING = 8
_ARRAY = 9
# GGUF value type -> struct format of one scalar.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's entry in the header.

    `shape` is outermost dimension first (numpy and torch order; the file stores it reversed),
    `type_id` the ggml quantisation type, `offset` the first byte of the data in the file.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


class GgufHeader(NamedTuple):
    """Metadata as plain Python values, and the tensors in file order."""

    metadata: dict[str, object]
    tensors: tuple[GgufTensor, ...]


def read_header(path: str | Path) -> GgufHeader:
    """Header of the GGUF file at `path`. CheckpointError if it is not one or is cut short."""
    try:
        with (
            Path(path).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _Parser(data).header()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (struct.error, ValueError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path}: not a whole GGUF file: {error}") from error


def read_metadata(path: str | Path) -> dict[str, object]:
    """Metadata of the GGUF file at `path`: int, float, bool, str, or a list of those.

    CheckpointError if the file is not a GGUF file or is cut short.
    """
    return read_header(path).metadata


def tensor_names(path: str | Path) -> tuple[str, ...]:
    """Names of the tensors in file order. CheckpointError as `read_header`."""
    return tuple(tensor.name for tensor in read_header(path).tensors)


class _Parser:
    """A cursor over the mapped file. Raises struct.error or ValueError where it makes no sense."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def header(self) -> GgufHeader:
        if self._data[:4] != _MAGIC:
            raise ValueError("the magic number is wrong")
        self._at = 4
        version = self._u32()
        if version not in _VERSIONS:
            raise ValueError(f"version {version}, known are {_VERSIONS} in little-endian order")
        num_tensors, num_values = self._u64(), self._u64()
        metadata: dict[str, object] = {}
        for _ in range(num_values):
            key = self._string()
            metadata[key] = self._value(self._u32())
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        tensors = tuple(
            GgufTensor(name, shape, type_id, start + offset)
            for name, shape, type_id, offset in entries
        )
        return GgufHeader(metadata, tensors)

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        sizes = self._scalars("Q", self._u32())
        return name, tuple(int(size) for size in reversed(sizes)), self._u32(), self._u64()

    def _value(self, type_id: int) -> object:
        if type_id == _STRING:
            return self._string()
        if type_id == _ARRAY:
            item_type, count = self._u32(), self._u64()
            if item_type in _SCALARS:
                return list(self._scalars(_SCALARS[item_type], count))
            if item_type == _STRING:
                return self._strings(count)
            return [self._value(item_type) for _ in range(count)]
        if type_id in _SCALARS:
            return self._scalars(_SCALARS[type_id], 1)[0]
        raise ValueError(f"unknown value type {type_id}")

    def _scalars(self, code: str, count: int) -> tuple[int | float | bool, ...]:
        layout = struct.Struct(f"<{count}{code}")
        values: tuple[int | float | bool, ...] = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return values

    def _strings(self, count: int) -> list[str]:
        # A vocabulary and its merges are some 300,000 strings: locals, no call per string.
        data, at, unpack = self._data, self._at, _U64.unpack_from
        strings = []
        for _ in range(count):
            start = at + 8
            at = start + unpack(data, at)[0]
            strings.append(data[start:at].decode("utf-8"))
        self._at = at
        return strings

    def _string(self) -> str:
        return self._strings(1)[0]

    def _u32(self) -> int:
        value: int = _U32.unpack_from(self._data, self._at)[0]
        self._at += 4
        return value

    def _u64(self) -> int:
        value: int = _U64.unpack_from(self._data, self._at)[0]
        self._at += 8
        return value
