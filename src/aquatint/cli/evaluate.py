"""`evaluate`: how good the pictures of a model are, in numbers."""

from __future__ import annotations

from typing import Annotated

import typer

from aquatint.cli.arguments import ConfigFile, Overrides


def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A checkpoint, such as step-000500, or `base` for the base model; the newest if left out."),
    ] = None,
    keep_pictures: Annotated[
        bool, typer.Option("--keep-pictures", help="Keep the pictures that are made; another time, those are not made again.")
    ] = False,
) -> None:
    """Draw the captions of held-out pictures and compare the result with the pictures: CLIP score, CMMD, FD-DINOv2, FID."""
    from aquatint.config.load import load_config
    from aquatint.training.evaluation import evaluate_run, report_text

    result = evaluate_run(load_config(config, overrides or []), checkpoint, keep_pictures=keep_pictures)
    typer.echo(f"{report_text(result.report)}\nwrote {result.path}")
