"""What every bench writes: how it was run, where, and what came out."""

import json
from pathlib import Path

from csps.core.errors import ConfigError
from csps.records.provenance import provenance


def check_writable(path: Path | None) -> None:
    """ConfigError if `write` could not write there: known before minutes of measuring."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"--json: {path}: {error.strerror}") from None


def write(path: Path | None, bench: str, parameters: object, results: object) -> None:
    """Write one run's JSON; nothing if no path was given.

    A file that was there is replaced whole: whoever reads it meanwhile, or ends this process,
    finds one record or the other.
    """
    if path is None:
        return
    record = {"bench": bench, **provenance(), "parameters": parameters, "results": results}
    text = json.dumps(record, indent=1) + "\n"
    if path.exists() and not path.is_file():  # a pipe or a device
        path.write_text(text)
        return
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
