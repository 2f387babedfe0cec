"""Weights in Hugging Face format: one model.safetensors, or shards named by an index."""

import json
from collections import defaultdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from csps.core.errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class SafetensorsSource:
    """The tensors of a directory (csps.model.source). Files stay memory-mapped while it lives."""

    def __init__(self, directory: Path) -> None:
        self._files = {path: _open(path) for path in _weight_files(directory)}
        self._homes: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path, file in self._files.items():
            for name in file.keys():  # noqa: SIM118 - a safetensors file is not iterable
                if name in self._homes:
                    raise CheckpointError(f"{name} is both in {self._homes[name]} and in {path}")
                self._homes[name] = path
                self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def file_name(self, name: str) -> str:
        return name

    def is_ignorable(self, file_name: str) -> bool:
        # A buffer that transformers before 4.32 saved with the weights.
        return file_name.endswith(".rotary_emb.inv_freq")

    def read(self, file_name: str, rows: slice, columns: slice) -> Tensor:
        window = self._files[self._homes[file_name]].get_slice(file_name)
        tensor: Tensor = window[rows] if len(self.shapes[file_name]) == 1 else window[rows, columns]
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{self._homes[file_name]}: {file_name} is {tensor.dtype}, not floating-point"
            )
        return tensor


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error


def _weight_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if not index.is_file():
        single = directory / _SINGLE
        if not single.is_file():
            raise CheckpointError(f"{directory}: neither {_SINGLE} nor {_INDEX}")
        return [single]
    shards = defaultdict(list)
    try:
        for name, shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            shards[directory / shard].append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of shards: {error!r}") from error
    for path, names in shards.items():
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; {index.name} says it holds {names[0]}")
    return list(shards)
