import tomllib

import pytest

from aquatint.cli import doctor
from aquatint.cli.doctor import Gpu
from aquatint.cli.init import PRESETS
from aquatint.cli.main import run
from aquatint.config.load import load_config
from aquatint.config.template import preset_names


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "find_gpus", list)
    return tmp_path


def test_a_config_is_written_that_loads(here, capsys):
    assert run(["init", "--preset", "full-16gb", "--base", "models/x.safetensors", "--pictures", "a", "--pictures", "b"]) == 0
    config = load_config(here / "run.toml")
    assert config.model.base == here / "models" / "x.safetensors"
    assert [source.path for source in config.data.sources] == [str(here / "a"), str(here / "b")]
    assert config.optimizer.name == "adamw8bit"
    assert "aquatint check run.toml" in capsys.readouterr().out


def test_pictures_may_be_a_table_or_elsewhere(here):
    assert run(["init", "--vram", "16", "--pictures", "sets/a.jsonl", "--pictures", "s3://bucket/set-*.tar"]) == 0
    assert [source["path"] for source in tomllib.loads((here / "run.toml").read_text())["data"]["sources"]] == [
        str(here / "sets" / "a.jsonl"),
        "s3://bucket/set-*.tar",
    ]


def test_without_base_and_pictures_it_says_what_to_fill_in(capsys):
    assert run(["init", "--vram", "24"]) == 0
    assert "set model.base and data.sources" in capsys.readouterr().out


def test_the_name_of_the_file_is_the_name_of_the_run(here):
    assert run(["init", "portrait.toml", "--vram", "80"]) == 0
    assert load_config(here / "portrait.toml").run.name == "portrait"
    assert run(["init", "other.toml", "--vram", "80", "--name", "x"]) == 0
    assert load_config(here / "other.toml").run.name == "x"
    assert run(["init", "my first rün.toml", "--vram", "80"]) == 0
    assert load_config(here / "my first rün.toml").run.name == "my-first-r-n"


def test_the_gpu_here_chooses_the_preset(here, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "find_gpus", lambda: [Gpu("a", 11.99, 11, "1"), Gpu("b", 23.99, 23, "1")])
    assert run(["init"]) == 0
    shown = capsys.readouterr().out
    assert "24 GB" in shown
    assert "full-24gb" in shown


def test_without_a_gpu_it_says_so(capsys):
    assert run(["init"]) == 0
    assert "found no GPU" in capsys.readouterr().out


def test_a_file_that_is_there_is_never_overwritten(here, capsys):
    (here / "run.toml").write_text("mine")
    assert run(["init"]) == 2
    assert (here / "run.toml").read_text() == "mine"
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run.yaml"], "does not end in .toml"),
        (["--preset", "full-24"], "did you mean full-24gb?"),
        (["--vram", "4"], "too small"),
        (["--name", "my run"], "letters, digits"),
    ],
)
def test_mistakes_are_explained_and_nothing_is_written(here, capsys, arguments, words):
    assert run(["init", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_the_short_form_has_only_what_the_preset_sets(here):
    assert run(["init", "--vram", "12", "--short"]) == 0
    text = (here / "run.toml").read_text()
    assert "# name =" not in text
    assert tomllib.loads(text)["training"]["precision"] == "bf16_pure"


def test_the_help_names_the_presets_that_there_are():
    assert PRESETS.split(", ") == list(preset_names())
