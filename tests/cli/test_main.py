import os
import subprocess
import sys

import pytest
import typer

from aquatint import __version__
from aquatint.cli import main as module
from aquatint.cli.main import in_words, run
from aquatint.errors import DataError, Interrupted, LockedError, NumericalError, ResumeError, StorageError, UsageError

VERBS = (
    "init",
    "check",
    "plan",
    "plot",
    "train",
    "sample",
    "export",
    "evaluate",
    "train-vae",
    "ema",
    "demo",
    "doctor",
    "import",
    "data",
    "cache",
    "config",
)
GROUPS = ("data buckets", "data preview", "cache build", "cache verify", "cache stat", "cache gc", "config explain", "config schema",
          "config defaults", "config show")  # fmt: skip


@pytest.fixture
def verb(monkeypatch):
    """An app whose only verb raises what it is given."""

    def install(error):
        app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

        @app.callback()
        def options(): ...

        @app.command()
        def go():
            raise error

        monkeypatch.setattr(module, "app", app)

    return install


def test_help_names_every_verb(capsys):
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    lines = shown.partition("Commands:")[2].splitlines()
    assert [line.split()[0] for line in lines if line[2:].strip() and line[2] != " "] == list(VERBS)


@pytest.mark.parametrize("verb", [*VERBS, *GROUPS])
def test_every_verb_has_help_in_words(capsys, verb):
    assert run([*verb.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Usage: aquatint" in shown
    assert "Traceback" not in shown


def test_the_version_is_shown(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"aquatint {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train"], ["check", "a.toml", "--no-such-option"], ["config"], ["data"], ["cache"], ["cache", "gc"], []]
)
def test_a_mistake_on_the_command_line_is_exit_code_2(capsys, arguments):
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert "Usage: aquatint" in captured.err + captured.out


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError, 2), (DataError, 3), (NumericalError, 4), (StorageError, 5), (ResumeError, 6), (LockedError, 7), (Interrupted, 75)],
)
def test_errors_are_shown_in_words_with_their_exit_code(verb, capsys, error, code):
    verb(error("what happened", hint="what to do"))
    assert run(["go"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("what happened\n\nhint: what to do\n")
    assert captured.err.startswith("error: ") == (error is not Interrupted)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_stopped_at_once_is_exit_code_130(verb, error):
    verb(error)
    assert run(["go"]) == 130


def test_a_bug_is_one_sentence_and_exit_code_1(verb, capsys):
    verb(ZeroDivisionError("division by zero\nmore"))
    assert run(["go"]) == 1
    shown = capsys.readouterr().err
    assert "ZeroDivisionError: division by zero" in shown
    assert "--debug" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("where", ["option before", "option after", "environment"])
def test_the_traceback_is_there_for_who_asks(verb, capsys, monkeypatch, where):
    verb(ZeroDivisionError("division by zero"))
    if where == "environment":
        monkeypatch.setenv("AQUATINT_DEBUG", "1")
    arguments = {"option before": ["--debug", "go"], "option after": ["go", "--debug"]}.get(where, ["go"])
    assert run(arguments) == 1
    assert "Traceback" in capsys.readouterr().err


def test_full_memory_is_explained():
    class OutOfMemoryError(RuntimeError):
        pass

    assert "aquatint plan" in in_words(OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nlong story"))
    assert "aquatint plan" in in_words(RuntimeError("CUDA error: out of memory"))
    assert "main memory" in in_words(MemoryError())


def test_exit_codes_are_the_program_s(tmp_path):
    command = [sys.executable, "-m", "aquatint", "check", str(tmp_path / "none.toml")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: there is no config file")


def test_a_closed_pipe_is_no_error(tmp_path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    result = subprocess.run([sys.executable, "-m", "aquatint", "config", "schema"], stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert "Traceback" not in result.stderr
