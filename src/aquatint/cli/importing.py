"""`import`: datasets as other trainers were told about them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from aquatint.errors import UsageError


def import_(
    path: Annotated[Path, typer.Argument(help="A dataset config of sd-scripts (.toml, .json), or a folder of folders such as 10_word.")],
    output: Annotated[Path, typer.Option(help="The config to write.")] = Path("run.toml"),
    reg: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Regularization pictures, in a folder of such folders too.")] = None,
) -> None:
    """Make a config of a dataset of sd-scripts, and say what became of each option. Changes nothing there."""
    from aquatint.cli.init import run_name
    from aquatint.config.importers.draft import report_text, to_toml
    from aquatint.config.importers.sd_scripts import import_dataset
    from aquatint.storage import write_text

    if output.suffix != ".toml":
        raise UsageError(f"{output} does not end in .toml", hint="choose a name such as run.toml")
    if output.exists():
        raise UsageError(f"{output} exists already", hint="choose another name with --output, or move it away; it is not overwritten")
    imported = import_dataset(path, regularization=reg)
    imported = replace(imported, config={"run": {"name": run_name(None, output)}, **imported.config})
    write_text(output, to_toml(imported))
    typer.echo(f"wrote {output} from {imported.source}")
    typer.echo(report_text(imported))
    counts = [f"{imported.count('mapped')} taken over", f"{imported.count('approximated')} with a difference"]
    typer.echo(f"{', '.join(counts)}, {imported.count('not supported')} not taken over")
    typer.echo(f"next: set model.base in it, then run `aquatint check {output}`")
