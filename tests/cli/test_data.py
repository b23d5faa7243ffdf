from pathlib import Path

import pytest

from aquatint.cli.main import run
from aquatint.training import preview


@pytest.fixture
def config(tmp_path):
    """Of a model and pictures that are not there."""
    path = tmp_path / "run.toml"
    path.write_text('[model]\nbase = "none.safetensors"\n[[data.sources]]\npath = "pictures"\n')
    return path


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(preview, "buckets_run", lambda config, plot: made.append((config, plot)) or "a table")
    monkeypatch.setattr(preview, "preview_run", lambda config, output, **options: made.append((config, output, options)) or output)
    return made


def test_buckets_are_shown_and_drawn_if_wanted(config, calls, capsys):
    assert run(["data", "buckets", str(config), "buckets.resolution=768"]) == 0
    assert capsys.readouterr().out == "a table\n"
    assert (calls[0][0].buckets.resolution, calls[0][1]) == (768, None)
    assert run(["data", "buckets", str(config), "--plot", "x.png"]) == 0
    assert calls[1][1] == Path("x.png")
    assert capsys.readouterr().out == "a table\n\nwrote x.png\n"


def test_a_preview_says_where_it_is(config, calls, capsys):
    assert run(["data", "preview", str(config)]) == 0
    assert calls[0][1:] == (Path("preview.html"), {"num_pictures": 24, "num_inspected": 2000})
    assert run(["data", "preview", str(config), "--output", "x.html", "--pictures", "3", "--inspect", "0"]) == 0
    assert calls[1][1:] == (Path("x.html"), {"num_pictures": 3, "num_inspected": 0})
    assert capsys.readouterr().out == "wrote preview.html\nwrote x.html\n"


@pytest.mark.parametrize("verb", ["buckets", "preview"])
def test_a_wrong_config_is_told_with_all_its_mistakes(config, calls, capsys, verb):
    assert run(["data", verb, str(config), "buckets.resolutoin=768", "crop.flip_prob=2"]) == 2
    assert calls == []
    assert capsys.readouterr().err.count("error: ") == 2
