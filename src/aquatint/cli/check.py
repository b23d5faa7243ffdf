"""`check` and `plan`: what can be known before a run."""

from __future__ import annotations

import typer

from aquatint.cli.arguments import ConfigFile, Overrides, inspect_all, refuse_problems


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


def plan(config: ConfigFile, overrides: Overrides = None) -> None:
    """Show the steps, the memory by part and the disk space of a run, before it starts."""
    from aquatint.config.load import load_config
    from aquatint.planning.report import plan_text

    typer.echo(plan_text(load_config(config, overrides or [])), nl=False)
