"""Flags that several benches take, and the table each prints."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from csps.bench.measure import ServerFlags
from csps.core.attention import AttentionKind
from csps.core.errors import ConfigError
from csps.core.strategy import Strategy

console = Console()

Model = Annotated[str, typer.Option(help="As in csps serve.")]
Ranks = Annotated[int, typer.Option(min=1, help="Ranks of the server.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of a rank.")]
Stage = Annotated[int, typer.Option(min=1, help="New tokens of one prefill step.")]
Text = Annotated[Path | None, typer.Option(help="Real text, in place of random tokens.")]
ServeFlags = Annotated[
    str, typer.Option("--serve", help="More flags of csps serve, such as '--csa-wire int8'.")
]
Seed = Annotated[int, typer.Option(help="Of the random tokens.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")]


def lengths(flag: str, text: str) -> list[int]:
    """ConfigError naming `flag` unless `text` is positive numbers separated by commas."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{flag}: expected positive numbers such as 2048,8000, got {text!r}")
    return numbers


def show(rows: list[dict[str, object]], *columns: str) -> None:
    """Print these columns of the rows as a table."""
    table = Table()
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        cells = (row[column] for column in columns)
        table.add_row(*map(_cell, cells))
    console.print(table)


def _cell(value: object) -> str:
    if isinstance(value, int | float) and abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parameters(
    flags: ServerFlags, text: Path | None, seed: int, **others: object
) -> dict[str, object]:
    """What the record says about how a bench was run."""
    return {
        **others,
        "server": flags.arguments(),
        "text": str(text.name) if text else None,
        "seed": seed,
    }


def strategy_names(words: str) -> list[Strategy]:
    """ConfigError unless `words` are names of strategies separated by commas."""
    try:
        return [Strategy(word) for word in words.split(",")]
    except ValueError:
        raise ConfigError(
            f"--strategies: expected some of {', '.join(Strategy)}, got {words!r}"
        ) from None


def attention_kinds(words: str) -> list[AttentionKind]:
    """ConfigError unless `words` are names of kinds separated by commas."""
    try:
        return [AttentionKind(word) for word in dict.fromkeys(words.split(","))]
    except ValueError:
        choices = ", ".join(AttentionKind)
        raise ConfigError(f"--attention: expected some of {choices}, got {words!r}") from None
