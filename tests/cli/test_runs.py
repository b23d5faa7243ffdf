from pathlib import Path
from types import SimpleNamespace

import pytest

from aquatint.cli.main import run
from aquatint.training import build, results


@pytest.fixture
def good(tmp_path, tiny_base):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").touch()
    (pictures / "a.txt").touch()
    path = tmp_path / "run.toml"
    path.write_text(f'[model]\nbase = "{tiny_base}"\n[[data.sources]]\npath = "pictures"\n')
    return path


@pytest.fixture
def calls(monkeypatch):
    """Each verb's work, replaced by a note of what it was given."""
    made = []

    def stand_in(name, result):
        def work(config, *arguments, **options):
            made.append((name, config, arguments, options))
            return result

        monkeypatch.setattr(build if name == "train_run" else results, name, work)

    stand_in("train_run", SimpleNamespace(state=SimpleNamespace(step=1200), folder=Path("runs/x"), exported=(Path("x.safetensors"),)))
    stand_in("sample_run", Path("sample.png"))
    stand_in("export_run", (Path("a.safetensors"), Path("a")))
    return made


def test_train_gets_the_checked_config(good, calls, capsys):
    assert run(["train", str(good), "training.batch_size=2", "--accept-changes"]) == 0
    ((name, config, _, options),) = calls
    assert (name, config.training.batch_size, options) == ("train_run", 2, {"accept_changes": True})
    captured = capsys.readouterr()
    assert captured.out == "trained 1,200 steps; the run is in runs/x\nexported x.safetensors\n"
    assert "only 1" in captured.err


def test_nothing_begins_with_a_wrong_config(good, calls, capsys):
    assert run(["train", str(good), "training.batchsize=2", "model.base=none.safetensors"]) == 2
    assert calls == []
    assert capsys.readouterr().err.count("error: ") == 2


def test_sample_tells_prompts_from_settings(good, calls, capsys):
    prompts = ["a cat, eyes=blue", "b = c"]
    assert run(["sample", str(good), prompts[0], "samples.steps=4", prompts[1], "--checkpoint", "step-000100", "--output", "x.png"]) == 0
    ((_, config, arguments, _),) = calls
    assert arguments == (prompts, "step-000100", Path("x.png"))
    assert config.samples.steps == 4
    assert capsys.readouterr().out == "wrote sample.png\n"


def test_export_takes_formats(good, calls, capsys):
    assert run(["export", str(good), "--format", "diffusers", "--format", "single_file"]) == 0
    assert calls[0][2] == (None, None, ("diffusers", "single_file"))
    assert capsys.readouterr().out == "exported a.safetensors\nexported a\n"


def test_export_takes_the_config_s_formats_if_none_are_given(good, calls):
    assert run(["export", str(good)]) == 0
    assert calls[0][2] == (None, None, ())


def test_demo_prints_its_summary(monkeypatch, capsys, tmp_path):
    from aquatint.demo import run as demo

    monkeypatch.setattr(demo, "run_demo", lambda folder: f"result in {folder}")
    monkeypatch.setattr(demo, "summary", lambda result: f"summary of {result}")
    assert run(["demo", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"summary of result in {tmp_path}\n"
