"""`ema`: an average of the weights that is chosen after the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aquatint.cli.arguments import ConfigFile, Overrides


def ema(
    config: ConfigFile,
    std: Annotated[
        float,
        typer.Option("--std", metavar="WIDTH", help="How wide the average is, as a share of the run up to its step, such as 0.08."),
    ],
    overrides: Overrides = None,
    step: Annotated[int | None, typer.Option(metavar="N", help="The step where it ends; the last snapshot's if left out.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="PATH", help="Where to write, without the ending.")] = None,
) -> None:
    """Make an average of any length from the snapshots that `ema.power_stds` left, and export it."""
    from aquatint.config.load import load_config
    from aquatint.training.results import average_run

    for path in average_run(load_config(config, overrides or []), std, step, output):
        typer.echo(f"exported {path}")
