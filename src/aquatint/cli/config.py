"""`config`: the settings themselves."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from aquatint.cli.arguments import ConfigFile, Overrides

app = typer.Typer(help="Look at settings: all of them, their defaults, or those of a config.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def explain(key: Annotated[str, typer.Argument(help="A setting or section, such as training.length; all if left out.")] = "") -> None:
    """Say what a setting does, what it can be, and its default."""
    from aquatint.config.explain import explanation

    typer.echo(explanation(key))


@app.command()
def defaults() -> None:
    """Print every setting with its default, as JSON."""
    from aquatint.config.explain import defaults_json

    typer.echo(defaults_json(), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON Schema of configs, for editors and forms."""
    from aquatint.config.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@app.command()
def show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print a config with all its settings, as JSON that can be used as a config."""
    from aquatint.config.load import load_config
    from aquatint.config.schema import dump

    typer.echo(json.dumps(dump(load_config(config, overrides or [])), indent=2, ensure_ascii=False))
