"""What the verbs have in common."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from aquatint.config.load import Draft
    from aquatint.config.schema import Config
    from aquatint.training.preflight import Inspection

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A .toml, .json or .yaml file, or the folder of a run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SECTION.SETTING=VALUE", help="Settings for this time, such as training.batch_size=2; paths start at the current folder."
    ),
]
AcceptChanges = Annotated[
    bool, typer.Option("--accept-changes", help="Go on with a run although settings that decide the training have changed.")
]


def inspect_all(path: Path, overrides: list[str] | None, *, for_vae: bool = False) -> tuple[Draft, Inspection]:
    """The config, and what is to be said about the files that it names. Raises ConfigError if it cannot even be read.

    `for_vae`: as far as `train-vae` needs them.
    """
    from aquatint.config.load import read_draft
    from aquatint.training.preflight import Inspection, inspect, inspect_vae

    draft = read_draft(path, overrides or [])
    return draft, (inspect_vae if for_vae else inspect)(Inspection(draft.config, draft.place, draft.broken))


def refuse_problems(draft: Draft, inspection: Inspection) -> None:
    """Raises ConfigError with all problems, if there are any."""
    from aquatint.config.load import in_order
    from aquatint.errors import ConfigError

    problems = in_order([*draft.problems, *inspection.problems])
    if problems:
        raise ConfigError(problems)


def checked_config(path: Path, overrides: list[str] | None, *, for_vae: bool = False) -> Config:
    """A config that was checked with all that it names. Raises ConfigError with all problems; notices go to stderr."""
    draft, inspection = inspect_all(path, overrides, for_vae=for_vae)
    refuse_problems(draft, inspection)
    for notice in inspection.notices:
        print(f"note: {notice}", file=sys.stderr)
    return draft.config
