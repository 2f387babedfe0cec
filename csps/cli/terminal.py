"""What every role of the command line says on standard error: its log, and one-line errors."""

import logging

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from csps.core.errors import ConfigError, CspsError

console = Console(stderr=True)


def start_logging(level: str) -> None:
    if level.upper() not in logging.getLevelNamesMapping():
        raise ConfigError(f"--log-level: expected DEBUG, INFO, WARNING or ERROR, got {level!r}")
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="[%X]"))
    else:  # a file or a collector: one line a record, whatever its length
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def print_error(error: CspsError) -> None:
    console.print("[bold red]error[/]:", Text(str(error)), soft_wrap=True)
