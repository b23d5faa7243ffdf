"""`demo` and `doctor`: does it work here?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(folder: Annotated[Path, typer.Argument(help="Where to put the demo's pictures, model and run.")] = Path("demo")) -> None:
    """Train a tiny model on pictures that the program draws itself. Takes minutes, needs no GPU."""
    from aquatint.demo.run import run_demo, summary

    typer.echo(summary(run_demo(folder)))


def doctor() -> None:
    """Look at versions, GPU, memory and disk, and say what to fix."""
    from aquatint.cli.doctor import doctor_text

    typer.echo(doctor_text(Path.cwd()))
