import json
from pathlib import Path

import pytest

from aquatint.config.schema import Config, dump
from aquatint.errors import ResumeError
from aquatint.training.resume import accept_config, changes


def config(**overrides) -> dict:
    values = {"model": {"base": "a.safetensors"}, "data": {"sources": [{"path": "pictures"}]}, **overrides}
    return dump(Config.model_validate(values))


def test_the_same_config_has_no_changes():
    assert changes(config(), config()) == []


@pytest.mark.parametrize(
    "section",
    [
        {"tracking": {"log_every": "3 steps"}},
        {"training": {"length": "2000 steps"}},
        {"loader": {"workers": 0}},
        {"vae_training": {"l1_weight": 2}},
        {"ema": {"snapshot_every": "3 steps"}},
    ],
)
def test_what_does_not_touch_the_training_may_change(section: dict):
    assert changes(config(), config(**section)) == []


def test_another_learning_rate_is_shown_with_both_values():
    assert changes(config(), config(optimizer={"name": "adamw", "learning_rate": 2e-5})) == ["optimizer.learning_rate: 1e-05 -> 2e-05"]


def test_another_optimizer_shows_its_name():
    assert "optimizer.name: adamw -> adafactor" in changes(config(), config(optimizer={"name": "adafactor"}))


def test_a_change_needs_to_be_accepted(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(config()))
    new = config(training={"batch_size": 4})
    said: list[str] = []
    with pytest.raises(ResumeError, match=r"training\.batch_size: 1 -> 4") as caught:
        accept_config(tmp_path, new, resuming=True, accept_changes=False, say=said.append)
    assert "--accept-changes" in caught.value.hint
    accept_config(tmp_path, new, resuming=True, accept_changes=True, say=said.append)
    assert said == ["changed: training.batch_size: 1 -> 4"]


def test_before_the_first_checkpoint_everything_may_change(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(config()))
    said: list[str] = []
    accept_config(tmp_path, config(training={"batch_size": 4}), resuming=False, accept_changes=False, say=said.append)
    assert said == []
