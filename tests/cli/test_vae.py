from pathlib import Path
from types import SimpleNamespace

import pytest

from aquatint.cli.main import run
from aquatint.training import vae_build


@pytest.fixture
def calls(monkeypatch):
    """The verb's work, replaced by a note of what it was given."""
    made = []

    def work(config, **options):
        made.append((config, options))
        return SimpleNamespace(state=SimpleNamespace(step=2000), folder=Path("runs/x-vae"), exported=(Path("x-vae.safetensors"),))

    monkeypatch.setattr(vae_build, "train_vae_run", work)
    return made


@pytest.fixture
def config(tmp_path, tiny_base):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    path = tmp_path / "run.toml"
    path.write_text(f'[model]\nbase = "{tiny_base}"\n[[data.sources]]\npath = "pictures"\n')
    return path


def test_train_vae_gets_the_config_with_pictures_that_need_no_captions(config, calls, capsys):
    assert run(["train-vae", str(config), "vae_training.batch_size=2", "--accept-changes"]) == 0
    ((found, options),) = calls
    assert (found.vae_training.batch_size, found.data.max_uncaptioned_share, options) == (2, 1.0, {"accept_changes": True})
    assert capsys.readouterr().out == "trained 2,000 steps; the run is in runs/x-vae\nexported x-vae.safetensors\n"


def test_a_weight_without_its_model_is_refused_before_anything_begins(config, calls, capsys):
    assert run(["train-vae", str(config), "vae_training.perceptual_weight=1"]) == 2
    assert calls == []
    assert "`vae_training.perceptual_weight` needs `vae_training.perceptual_model`" in capsys.readouterr().err


def test_what_would_stop_it_is_found_before_anything_begins(config, calls, capsys):
    gone = ["model.base=gone.safetensors", "vae_training.perceptual_weight=1", "vae_training.perceptual_model=vgg.safetensors"]
    assert run(["train-vae", str(config), *gone]) == 2
    assert calls == []
    said = capsys.readouterr().err
    assert "gone.safetensors" in said
    assert "there is no file" in said
    assert "docs/vae.md" in said
