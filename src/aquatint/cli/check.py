"""`check` and `plan`: what can be known before a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aquatint.cli.arguments import ConfigFile, Overrides, inspect_all, refuse_problems
from aquatint.errors import UsageError

if TYPE_CHECKING:
    from aquatint.config.schema import Config
    from aquatint.models.sdxl.model import ModelSpec


def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Find every mistake in a config and in the files it names. Loads nothing."""
    draft, inspection = inspect_all(config, overrides)
    for line in inspection.looked_at:
        typer.echo(f"looked at {line}")
    for notice in inspection.notices:
        typer.echo(f"note: {notice}")
    count = len(draft.problems) + len(inspection.problems)
    typer.echo(f"{count or 'no'} problem{'' if count == 1 else 's'} found in {draft.source.file}")
    refuse_problems(draft, inspection)


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    vram: Annotated[str | None, typer.Option(metavar="SIZE", help="Say whether it fits into so much memory, such as 12GiB.")] = None,
    fit: Annotated[str | None, typer.Option(metavar="SIZE", help="Find the settings of least cost that fit into so much memory.")] = None,
    write: Annotated[Path | None, typer.Option(metavar="FILE", help="With --fit: write them as a complete config.")] = None,
) -> None:
    """Show the steps, the memory by part and the disk space of a run, before it starts."""
    from aquatint.config.load import load_config

    refuse_odd_options(vram, fit, write)
    loaded = load_config(config, overrides or [])
    if fit is not None:
        show_fit(loaded, fit, write)
    elif vram is not None:
        show_vram(loaded, vram)
    else:
        from aquatint.planning.report import plan_text

        typer.echo(plan_text(loaded), nl=False)


def refuse_odd_options(vram: str | None, fit: str | None, write: Path | None) -> None:
    """Raises UsageError for options of `plan` that do not go together, and for a file that cannot be written."""
    if vram is not None and fit is not None:
        raise UsageError(
            "--vram and --fit are two questions", hint="leave out --vram: what --fit finds says how much is left of the memory"
        )
    if write is None:
        return
    if fit is None:
        raise UsageError("--write does nothing without --fit", hint="say for how much memory: --fit 12GiB --write run-12gb.toml")
    if write.suffix != ".toml":
        raise UsageError(f"{write} does not end in .toml", hint="choose a name such as run-12gb.toml")
    if write.exists():
        raise UsageError(f"{write} exists already", hint="choose another name, or move it away; it is not overwritten")


def show_vram(config: Config, size: str) -> None:
    """Prints whether a run fits. Raises UsageError for a size that is none."""
    from aquatint.planning.fit_report import parse_size, vram_text

    limit = parse_size(size)
    typer.echo(vram_text(config, known_spec(config), limit), nl=False)


def known_spec(config: Config) -> ModelSpec:
    """The sizes of the base model; says so if they had to be assumed. Raises UsageError, also for groups that do not suit it."""
    from aquatint.planning.report import find_spec
    from aquatint.planning.trained import check_groups

    spec, remark = find_spec(config)
    check_groups(config, spec)
    if remark:
        typer.echo(f"note: {remark}")
    return spec


def show_fit(config: Config, size: str, write: Path | None) -> None:
    """Prints what makes a run fit, and writes it as a config if asked to. Raises UsageError if nothing does."""
    from aquatint.planning.fit_report import parse_size, plan_to_fit
    from aquatint.storage import write_text

    limit = parse_size(size)
    text, fitted = plan_to_fit(config, known_spec(config), limit)
    typer.echo(text, nl=False)
    if write is not None:
        write_text(write, fitted)
        typer.echo(f"wrote {write}")
