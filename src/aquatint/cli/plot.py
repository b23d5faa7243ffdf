"""`plot`: what a config will do, as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aquatint.cli.arguments import ConfigFile, Overrides


def plot(
    config: ConfigFile,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder for the .png files.")] = Path("plots"),
) -> None:
    """Draw what a run will do: noise levels, loss weights, timesteps, sampling steps, learning rate."""
    from aquatint.config.load import load_config
    from aquatint.training.plotting import plot_run

    for drawn in plot_run(load_config(config, overrides or []), output):
        typer.echo(f"wrote {drawn.path}\n  {drawn.words}" if drawn.path else drawn.words)
