"""Models and servers that several files share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import write_tiny
from tests.e2e.harness import Running, serve
from tests.e2e.observed import Observed, observe
from tests.unit.tiny_tokenizers import byte_level

CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte-level tokenizer of 400 tokens, context 2048, no chat template."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny("llama", directory, vocab_size=400, max_position_embeddings=2048)
    byte_level().save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="session")
def tiny_chat(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template."""
    directory = tmp_path_factory.mktemp("models") / "tiny-chat"
    directory.mkdir()
    for file in tiny.iterdir():
        (directory / file.name).symlink_to(file)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def two_ranks(tiny: Path) -> Iterator[Running]:
    """The tiny model on two ranks; prompts of 128 tokens and more span both."""
    with serve(
        *("--model", str(tiny), "--workers", "2", "--dtype", "float32"),
        *("--block-size", "16", "--long-tokens", "128", "--stage-tokens", "512"),
    ) as running:
        yield running


@pytest.fixture(scope="session")
def observed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """The tiny model on two ranks with metrics, spans and a step log."""
    with observe(tiny, tmp_path_factory.mktemp("observed")) as found:
        yield found


@pytest.fixture(scope="session")
def openai_server(tiny_chat: Path) -> Iterator[Running]:
    """The tiny model on two ranks for OpenAI's clients; 256 tokens and more are prefilled sparsely.

    900 prompt tokens may wait.
    """
    with serve(
        *("--model", str(tiny_chat), "--workers", "2", "--dtype", "float32", "--http-port", "0"),
        *("--block-size", "16", "--long-tokens", "128", "--stage-tokens", "128"),
        *("--attention", "csa", "--csa-min-tokens", "256"),
        *("--max-running", "3", "--max-waiting-tokens", "900"),
    ) as running:
        yield running
