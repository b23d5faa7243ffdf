"""`train-vae`: the autoencoder's decoder."""

from __future__ import annotations

import typer

from aquatint.cli.arguments import AcceptChanges, ConfigFile, Overrides, checked_config


def train_vae(
    config: ConfigFile,
    overrides: Overrides = None,
    accept_changes: AcceptChanges = False,
) -> None:
    """Train the autoencoder's decoder. Ctrl-C saves and stops; the same command goes on. See docs/vae.md."""
    needs_no_captions = "data.max_uncaptioned_share=1"
    checked = checked_config(config, [*(overrides or []), needs_no_captions], for_vae=True)
    from aquatint.training.vae_build import train_vae_run

    result = train_vae_run(checked, accept_changes=accept_changes)
    typer.echo(f"trained {result.state.step:,} steps; the run is in {result.folder}")
    for path in result.exported:
        typer.echo(f"exported {path}")
