"""`train`, `sample` and `export`: the work."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from aquatint.cli.arguments import AcceptChanges, ConfigFile, Overrides, checked_config

_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z0-9_]+)+=")  # no prompt begins like that

Checkpoint = Annotated[str | None, typer.Option(metavar="NAME", help="A checkpoint, such as step-000500; the newest if left out.")]


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    accept_changes: AcceptChanges = False,
) -> None:
    """Train, or go on where the run was stopped. Ctrl-C saves and stops; the same command goes on."""
    checked = checked_config(config, overrides)
    from aquatint.training.build import train_run

    result = train_run(checked, accept_changes=accept_changes)
    typer.echo(f"trained {result.state.step:,} steps; the run is in {result.folder}")
    for path in result.exported:
        typer.echo(f"exported {path}")


def sample(
    config: ConfigFile,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT or SECTION.SETTING=VALUE", help="What to show; the config's samples.prompts if left out."),
    ] = None,
    checkpoint: Checkpoint = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="The .png file to write.")] = None,
) -> None:
    """Make pictures with a run's model."""
    from aquatint.config.load import load_config
    from aquatint.training.results import sample_run

    overrides = [word for word in prompts or [] if _OVERRIDE.match(word)]
    words = [word for word in prompts or [] if word not in overrides]
    path = sample_run(load_config(config, overrides), words, checkpoint, output)
    typer.echo(f"wrote {path}")


class Format(Enum):
    """What `export` can write."""

    SINGLE_FILE = "single_file"
    DIFFUSERS = "diffusers"


def export(
    config: ConfigFile,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    output: Annotated[Path | None, typer.Option(metavar="PATH", help="Where to write, without the ending.")] = None,
    formats: Annotated[list[Format] | None, typer.Option("--format", help="The whole model, even of an adapter; can be repeated.")] = None,
) -> None:
    """Write a checkpoint as a model that other programs load."""
    from aquatint.config.load import load_config
    from aquatint.training.results import export_run

    for path in export_run(load_config(config, overrides or []), checkpoint, output, tuple(one.value for one in formats or [])):
        typer.echo(f"exported {path}")
