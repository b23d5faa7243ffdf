import pytest
import typer

from aquatint.cli import main
from aquatint.cli.importing import import_
from aquatint.config.load import load_config

DATASET = """
[general]
shuffle_caption = true
caption_extension = '.txt'
[[datasets]]
resolution = 1024
enable_bucket = true
  [[datasets.subsets]]
  image_dir = 'Bär'
  num_repeats = 4
  color_aug = true
  flip_augg = true
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("import")(import_)
    monkeypatch.setattr(main, "app", app)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Bär").mkdir()
    (tmp_path / "Bär" / "a.png").touch()
    (tmp_path / "dataset.toml").write_text(DATASET, encoding="utf-8")
    return tmp_path


def test_a_config_is_written_that_loads_and_the_report_is_shown(here, capsys):
    assert main.run(["import", "dataset.toml", "--output", "bear.toml"]) == 0
    config = load_config(here / "bear.toml")
    assert config.run.name == "bear"
    assert config.data.sources[0].path == str(here / "Bär")
    assert config.data.sources[0].repeats == 4
    assert config.captions.shuffle
    assert config.buckets.set == "kohya"
    shown = capsys.readouterr().out
    assert "wrote bear.toml" in shown
    assert "flip_augg = true" in shown
    assert "2 not taken over" in shown
    assert "aquatint check bear.toml" in shown


def test_regularization_folders(here, capsys):
    for folder in ("set/2_word", "reg/1_word"):
        (here / folder).mkdir(parents=True)
        (here / folder / "a.png").touch()
    assert main.run(["import", "set", "--reg", "reg"]) == 0
    assert [source.role for source in load_config(here / "run.toml").data.sources] == ["train", "regularization"]


def test_a_file_that_is_there_is_never_overwritten(here, capsys):
    (here / "run.toml").write_text("mine")
    assert main.run(["import", "dataset.toml"]) == 2
    assert (here / "run.toml").read_text() == "mine"
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.toml"], "there is no file or folder none.toml"),
        (["dataset.toml", "--output", "run.yaml"], "does not end in .toml"),
        (["Bär"], "no folders of pictures with repeats"),
        (["broken.toml"], "broken TOML"),
        (["dataset.toml", "--reg", "Bär"], "names its own"),
    ],
)
def test_mistakes_are_explained_and_nothing_is_written(here, capsys, arguments, words):
    (here / "broken.toml").write_text("[[datasets]\n")
    before = sorted(here.iterdir())
    assert main.run(["import", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert sorted(here.iterdir()) == before
