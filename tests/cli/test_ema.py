from pathlib import Path

import pytest

from aquatint.cli.main import run
from aquatint.training import results


@pytest.fixture
def calls(monkeypatch):
    made = []

    def average_run(config, *arguments):
        made.append((config, arguments))
        return (Path("a.safetensors"), Path("a"))

    monkeypatch.setattr(results, "average_run", average_run)
    return made


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[model]\nbase = "base.safetensors"\n[[data.sources]]\npath = "pictures"\n')
    return str(path)


def test_the_width_is_given_afterwards(config, calls, capsys):
    assert run(["ema", config, "--std", "0.08"]) == 0
    assert calls[0][1] == (0.08, None, None)
    assert capsys.readouterr().out == "exported a.safetensors\nexported a\n"


def test_step_path_and_settings_can_be_given(config, calls):
    assert run(["ema", config, "export.dtype=float32", "--std", "0.12", "--step", "4000", "--output", "x/y"]) == 0
    ((checked, arguments),) = calls
    assert arguments == (0.12, 4000, Path("x/y"))
    assert checked.export.dtype == "float32"


def test_without_a_width_there_is_nothing_to_make(config, calls, capsys):
    assert run(["ema", config]) == 2
    assert "--std" in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize(
    ("value", "words"), [("[0.05,0.1]", None), ("0.05", "a list of numbers from 0.01 to 0.25"), ("[0.5]", "power_stds")]
)
def test_widths_are_a_list_of_numbers(config, calls, capsys, value, words):
    assert run(["ema", config, f"ema.power_stds={value}", "--std", "0.08"]) == (2 if words else 0)
    assert words is None or words in capsys.readouterr().err
