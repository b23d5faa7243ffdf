import os
import re
import subprocess
import sys

import pytest

from aquatint.cli.main import run

PLANTED = """\
[run]
seed = -1

[model]
base = "missing.safetensors"
predicton = "epsilon"

[[data.sources]]
path = "picturs"

[captions]
style = "prose"
shuffle = true

[optimizer]
learning_rate = "fast"

[training]
length = 1000
precison = "bf16_pure"
device = "gpu"

[samples]
height = 1000
"""
PLACES = [2, 5, 6, 9, 13, 16, 19, 20, 21, 24]  # the line of each


def test_ten_planted_mistakes_are_all_found_in_one_go_and_quickly(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(PLANTED)
    (tmp_path / "pictures").mkdir()
    code = (
        "import sys\nfrom aquatint.cli.main import run\ncode = run(sys.argv[1:])\nassert 'torch' not in sys.modules\nraise SystemExit(code)"
    )
    before = os.times()
    result = subprocess.run([sys.executable, "-c", code, "check", str(path)], capture_output=True, text=True)
    after = os.times()
    assert result.returncode == 2, result.stderr
    assert [int(line) for line in re.findall(r"run\.toml, line (\d+)$", result.stderr, re.MULTILINE)] == PLACES
    assert result.stderr.count("error: ") == result.stderr.count("hint: ") == 10
    assert "10 problems found" in result.stdout
    assert after.children_user + after.children_system - before.children_user - before.children_system < 3


@pytest.fixture
def good(tmp_path, tiny_base):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").touch()
    (pictures / "a.txt").touch()
    path = tmp_path / "run.toml"
    path.write_text(f'[model]\nbase = "{tiny_base}"\n[[data.sources]]\npath = "pictures"\n')
    return path


def test_a_good_config_is_told_so_with_what_was_looked_at(good, capsys):
    assert run(["check", str(good)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == f"no problems found in {good}"
    assert captured.out.count("looked at ") == 3
    assert captured.err == ""


def test_notices_are_no_problems(good, capsys):
    assert run(["check", str(good), "model.prediction=v_prediction"]) == 0
    assert "note: " in capsys.readouterr().out


def test_mistakes_in_overrides_are_problems_too(good, capsys):
    assert run(["check", str(good), "training.batchsize=2"]) == 2
    captured = capsys.readouterr()
    assert "1 problem found" in captured.out
    assert "in the command line" in captured.err


def test_plan_shows_the_plan_of_the_config(good, capsys, monkeypatch):
    from aquatint.planning import report

    monkeypatch.setattr(report, "plan_text", lambda config: f"plan of {config.run.name}\n")
    assert run(["plan", str(good), "run.name=x"]) == 0
    assert capsys.readouterr().out == "plan of x\n"


def test_plan_says_whether_a_run_fits_and_what_makes_it_fit(good, tmp_path, capsys, monkeypatch):
    from aquatint.planning import fit_report

    monkeypatch.setattr(fit_report, "vram_text", lambda config, spec, limit: f"{config.run.name} in {limit >> 30}\n")
    monkeypatch.setattr(fit_report, "plan_to_fit", lambda config, spec, limit: (f"fit of {limit >> 30}\n", "# fitted\n"))
    assert run(["plan", str(good), "run.name=x", "--vram", "12GiB"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "x in 12"
    target = tmp_path / "fitted.toml"
    assert run(["plan", str(good), "--fit", "8", "--write", str(target)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["fit of 8", f"wrote {target}"]
    assert target.read_text() == "# fitted\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--vram", "12", "--fit", "12"], "two questions"),
        (["--write", "x.toml"], "--write does nothing without --fit"),
        (["--fit", "12", "--write", "x.yaml"], "does not end in .toml"),
        (["--fit", "lots"], "`lots` is not a size of memory"),
        (["--vram", "12 parsecs"], "is not a size of memory"),
    ],
)
def test_odd_options_of_plan_are_usage_errors(good, capsys, options, words):
    assert run(["plan", str(good), *options]) == 2
    assert words in capsys.readouterr().err


def test_what_fit_writes_never_overwrites_a_file(good, capsys):
    before = good.read_text()
    assert run(["plan", str(good), "--fit", "12", "--write", str(good)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert good.read_text() == before
