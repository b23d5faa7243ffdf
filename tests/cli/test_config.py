import json

import pytest

from aquatint.cli.main import run
from aquatint.config.load import load_config


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[model]\nbase = "b"\n[[data.sources]]\npath = "p"\n')
    return path


def test_show_prints_a_config_that_loads_as_the_same(good, tmp_path, capsys):
    assert run(["config", "show", str(good), "training.batch_size=3"]) == 0
    copy = tmp_path / "copy.json"
    copy.write_text(capsys.readouterr().out)
    assert load_config(copy) == load_config(good, ["training.batch_size=3"])


def test_schema_prints_a_json_schema(capsys):
    assert run(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert set(schema["required"]) == {"model", "data"}


def test_explain_tells_about_a_setting(capsys):
    assert run(["config", "explain", "ema.decay"]) == 0
    assert "default  0.9999" in capsys.readouterr().out


def test_explain_suggests_the_nearest(capsys):
    assert run(["config", "explain", "ema.decy"]) == 2
    assert "did you mean `ema.decay`?" in capsys.readouterr().err


def test_explain_alone_lists_everything(capsys):
    assert run(["config", "explain"]) == 0
    assert "tracking.wandb.project" in capsys.readouterr().out
