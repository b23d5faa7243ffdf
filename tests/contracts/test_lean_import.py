"""What must be quick loads nothing heavy."""

import json
import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "matplotlib", "wandb", "tensorboard", "safetensors")
LEAN = (  # module -> what it may not load
    ("aquatint", (*HEAVY, "numpy", "pydantic", "typer")),
    ("aquatint.cli.main", (*HEAVY, "numpy", "pydantic", "ruamel", "rich", "PIL")),
    ("aquatint.config.schema", (*HEAVY, "numpy", "typer", "PIL")),
    ("aquatint.config.load", (*HEAVY, "numpy", "typer", "ruamel", "PIL")),
    ("aquatint.config.template", (*HEAVY, "numpy", "typer", "ruamel", "PIL")),
    ("aquatint.training.preflight", (*HEAVY, "typer", "PIL")),
    ("aquatint.storage", (*HEAVY, "numpy", "pydantic", "typer")),
    ("aquatint.tensor_file", (*HEAVY, "pydantic", "typer")),
    ("aquatint.models.sdxl.load", (*HEAVY, "PIL", "typer")),
    ("aquatint.planning.report", (*HEAVY, "typer")),
)


def loaded_by(code):
    """The top-level packages that a fresh Python has loaded after running `code`."""
    report = "\nimport json, sys\nprint(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    result = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(("module", "banned"), LEAN)
def test_importing_loads_nothing_heavy(module, banned):
    assert loaded_by(f"import {module}") & set(banned) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    code = f"from aquatint.cli.main import run\nassert run({arguments!r}) == 0"
    with_verbs = set() if arguments[0] == "train" else {"pydantic"}  # typer itself may use it for a verb's arguments
    assert loaded_by(code) & {*HEAVY, "numpy", "ruamel", "PIL", *with_verbs} == set()


def test_help_is_there_at_once():
    """In processor time, so that a busy computer does not fail it."""

    def seconds():
        before = os.times()
        subprocess.run([sys.executable, "-m", "aquatint", "--help"], capture_output=True, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.3
