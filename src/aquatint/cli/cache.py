"""`cache build`, `verify`, `stat` and `gc`: encoded pictures and captions, on disk."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from aquatint.cli.arguments import ConfigFile, Overrides, checked_config

app = typer.Typer(help="Encoded pictures and captions on disk: make, check, count and clear them.", no_args_is_help=True)


class EngineName(Enum):
    """Who encodes."""

    LOCAL = "local"
    PROCESSES = "processes"
    RAY = "ray"


@app.command()
def build(
    config: ConfigFile,
    overrides: Overrides = None,
    engine: Annotated[EngineName | None, typer.Option(help="Who encodes; as in the config if left out.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="How many encode at once, with processes or ray.")] = None,
) -> None:
    """Encode pictures and captions ahead of training. `train` does it by itself if need be."""
    chosen = [f"cache.engine={engine.value}"] if engine else []
    chosen += [f"cache.workers={workers}"] if workers else []
    checked = checked_config(config, [*(overrides or []), *chosen])
    from aquatint.training.caching import build_run

    typer.echo(build_run(checked))


@app.command()
def verify(config: ConfigFile, overrides: Overrides = None) -> None:
    """Read every entry and every picture again. What is damaged is removed, and made again by the next build."""
    from aquatint.config.load import load_config
    from aquatint.training.caching import verify_run

    typer.echo(verify_run(load_config(config, overrides or [])))


@app.command()
def stat(config: ConfigFile, overrides: Overrides = None) -> None:
    """How many entries there are, how large they are, and how many of them this config uses."""
    from aquatint.config.load import load_config
    from aquatint.training.caching import stat_run

    typer.echo(stat_run(load_config(config, overrides or [])))


@app.command()
def gc(
    configs: Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="Every config whose entries are to stay.")],
    remove: Annotated[bool, typer.Option("--remove", help="Remove them; without it, only tells what would be removed.")] = False,
) -> None:
    """Remove the entries that none of these configs uses. Refused while a run uses the cache."""
    from aquatint.config.load import load_config  # no more than that: a disk that is full is a reason to come here
    from aquatint.training.caching import gc_run

    typer.echo(gc_run([load_config(config) for config in configs], remove=remove))
