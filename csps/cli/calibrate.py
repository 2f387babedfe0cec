"""`csps calibrate`: steps of live runs -> a cluster file for the simulator."""

import importlib
from pathlib import Path
from typing import Annotated

import typer

from csps.cli.terminal import console
from csps.core.errors import ConfigError


def calibrate(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Live runs: folders of csps replay.")
    ],
    out: Annotated[Path, typer.Option(help="The cluster file, for csps simulate --cluster.")],
    name: Annotated[str, typer.Option(help="Of the cluster.")] = "calibrated",
) -> None:
    """Fit a cluster file to the steps of live runs, for csps simulate.

    csps calibrate runs/live-csps runs/live-sarathi --out this-machine.toml

    csps simulate chat.jsonl --cluster this-machine.toml --model smollm2-135m --out runs/sim

    Some steps of each lane must have run alone: take a low rate, or add such a run.
    """
    text = importlib.import_module("csps.sim.calibrate").calibrate(folders, name)
    try:
        out.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"--out: {out}: {error.strerror}") from None
    console.print(f"{out}: {text.count('[[server]]')} servers", highlight=False, soft_wrap=True)
