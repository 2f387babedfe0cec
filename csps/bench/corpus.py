"""Real text without a download: the source of Python's standard library."""

import sysconfig
from pathlib import Path

from csps.bench.measure import prompt_ids
from csps.checkpoint.locate import locate
from csps.checkpoint.tokenizer import load_tokenizer
from csps.core.errors import ConfigError

CHARS_PER_TOKEN = 8  # more than tokenizers make of source text


def corpus_ids(model: str, num_tokens: int, text: Path | None) -> list[int]:
    """The first tokens of `text`, or of the standard library's source.

    ConfigError if the text cannot be read or is too short.
    """
    if text is not None:
        return prompt_ids(model, num_tokens, text, seed=0)
    source = library_source(num_tokens * CHARS_PER_TOKEN)
    token_ids = load_tokenizer(locate(model)).encode(source, add_special_tokens=True)
    if len(token_ids) < num_tokens:
        raise ConfigError(
            f"--text: Python's standard library has {len(token_ids)} tokens, {num_tokens} are "
            "needed; give a longer text"
        )
    return token_ids[:num_tokens]


def library_source(num_chars: int) -> str:
    """The modules' source in the order of their names, cut to `num_chars` characters."""
    parts, length = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if length >= num_chars:
            break
        parts.append(path.read_text("utf-8"))
        length += len(parts[-1])
    return "".join(parts)[:num_chars]
