"""`data buckets` and `data preview`: a look at what will be trained, before anything is encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aquatint.cli.arguments import ConfigFile, Overrides

app = typer.Typer(help="Look at what will be trained, before anything is encoded.", no_args_is_help=True)


@app.command()
def buckets(
    config: ConfigFile,
    overrides: Overrides = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it into this .png file.")] = None,
) -> None:
    """Which shapes the pictures are trained in, what is cropped and enlarged, and what lies in small buckets."""
    from aquatint.config.load import load_config
    from aquatint.training.preview import buckets_run

    typer.echo(buckets_run(load_config(config, overrides or []), plot))
    if plot is not None:
        typer.echo(f"\nwrote {plot}")


@app.command()
def preview(
    config: ConfigFile,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="The .html file to write.")] = Path("preview.html"),
    pictures: Annotated[int, typer.Option(min=1, metavar="N", help="How many pictures to show.")] = 24,
    inspect: Annotated[int, typer.Option(min=0, metavar="N", help="How many to look at for copies, blur and the like.")] = 2000,
) -> None:
    """Write one page that shows exactly what the UNet will see: crops, captions, tokens, masks; and copies and blurred pictures."""
    from aquatint.config.load import load_config
    from aquatint.training.preview import preview_run

    typer.echo(f"wrote {preview_run(load_config(config, overrides or []), output, num_pictures=pictures, num_inspected=inspect)}")
