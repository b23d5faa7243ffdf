"""The command line: the verbs, and what becomes of errors. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from aquatint import __version__
from aquatint.cli import cache, check, config, data, ema, evaluate, importing, init, plot, runs, tools, vae
from aquatint.errors import AquatintError, Interrupted, full_memory, render

FORCED = 130  # what shells report for a program that Ctrl-C ended

app = typer.Typer(
    help="Trains Stable Diffusion XL. Begin with `aquatint init`, which writes a commented run.toml.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (
    init.init, check.check, check.plan, plot.plot, runs.train, runs.sample, runs.export,
    evaluate.evaluate, vae.train_vae, ema.ema, tools.demo, tools.doctor,
):  # fmt: skip
    app.command()(verb)
app.command("import")(importing.import_)
for name, group in (("data", data.app), ("cache", cache.app), ("config", config.app)):
    app.add_typer(group, name=name)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"aquatint {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the code an error arose (also AQUATINT_DEBUG=1).")] = False,
) -> None:
    """Options of all verbs; `--debug` may stand anywhere, and is taken out by `run`."""


def run(arguments: Sequence[str]) -> int:
    """Does what the arguments ask for, and returns the exit code. Errors are shown on stderr, in words."""
    debug = "--debug" in arguments or os.environ.get("AQUATINT_DEBUG", "0") not in ("", "0")
    try:
        result = app([argument for argument in arguments if argument != "--debug"], prog_name="aquatint", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        print("stopped at once; what was saved or encoded before stays", file=sys.stderr, flush=True)
        return FORCED
    except Exception as error:
        sys.stdout.flush()
        if hasattr(error, "show"):  # a mistake on the command line, as typer found it
            error.show()
            return int(getattr(error, "exit_code", 2))
        if debug:
            traceback.print_exc()
        print(in_words(error), file=sys.stderr, flush=True)
        return error.exit_code if isinstance(error, AquatintError) else 1
    return result if isinstance(result, int) else 0


def in_words(error: Exception) -> str:
    """An error as the user sees it, without a traceback."""
    if isinstance(error, Interrupted):
        return f"{error.message}\n\nhint: {error.hint}"
    if isinstance(error, AquatintError):
        return str(error)
    first_line = str(error).strip().partition("\n")[0]
    if full_memory(error) == "GPU":
        return render(
            f"the GPU is out of memory ({first_line})",
            "close other programs that use it; `aquatint plan` shows what needs how much, and what would make it less",
        )
    if full_memory(error) == "main":
        return render("the main memory is full", "close other programs, lower loader.workers, or keep the average on the GPU (ema.device)")
    return render(
        f"aquatint met something that it does not know how to handle ({type(error).__name__}: {first_line})",
        "this is a bug: run the same command with --debug and report what it prints; what was saved is safe",
    )


def main() -> None:
    """The entry point of the `aquatint` command."""
    raise SystemExit(run(sys.argv[1:]))
