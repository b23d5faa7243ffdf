import json
from pathlib import Path

import pytest

from aquatint.config.schema import Config, dump
from aquatint.errors import ResumeError
from aquatint.training.resume import accept_base, accept_config, changes


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
        {"memory": {"optimizer_state": "cpu", "swapped_blocks": 0.5}},
    ],
)
def test_what_does_not_touch_the_training_may_change(section: dict):
    assert changes(config(), config(**section)) == []


def test_another_learning_rate_is_shown_with_both_values():
    assert changes(config(), config(optimizer={"name": "adamw", "learning_rate": 2e-5})) == ["optimizer.learning_rate: 1e-05 -> 2e-05"]


def test_another_optimizer_shows_its_name():
    assert "optimizer.name: adamw -> adafactor" in changes(config(), config(optimizer={"name": "adafactor"}))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"name": "adamw"}, {"name": "adafactor"}),
        ({"name": "adamw_bf16"}, {"name": "adamw_bf16", "rounding": "kahan"}),
        ({"name": "soap"}, {"name": "soap", "max_precond_dim": 640}),
    ],
)
def test_another_optimizer_is_refused_whatever_is_accepted(before: dict, after: dict, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(config(optimizer=before)))
    with pytest.raises(ResumeError, match="of no use with another: optimizer") as caught:
        accept_config(tmp_path, config(optimizer=after), resuming=True, accept_changes=True, say=print)
    assert "aquatint export" in caught.value.hint


def test_another_format_of_frozen_weights_is_a_change():
    assert changes(config(), config(memory={"frozen_format": "int8"})) == ["memory.frozen_format: own -> int8"]


def test_another_group_is_a_change():
    groups = [{"match": ["mid_block"], "learning_rate_factor": 0.5}]
    (change,) = changes(config(training={"groups": groups}), config(training={"groups": [{**groups[0], "learning_rate_factor": 0.1}]}))
    assert change.startswith("training.groups: [{'match': ['mid_block'], 'learning_rate_factor': 0.5,")


def test_frozen_weights_come_from_the_model_that_the_run_began_with(tmp_path: Path):
    said: list[str] = []
    settings = {"accept_changes": False, "say": said.append}
    accept_base(tmp_path, "one", resuming=False, **settings)
    accept_base(tmp_path, "one", resuming=True, **settings)
    with pytest.raises(ResumeError, match=r"`model\.base` is not the model") as caught:
        accept_base(tmp_path, "other", resuming=True, **settings)
    assert "--accept-changes" in caught.value.hint
    accept_base(tmp_path, "other", resuming=True, **{**settings, "accept_changes": True})
    assert said == ["changed: the model that frozen weights come from"]
    accept_base(tmp_path, "other", resuming=True, **settings)


def test_a_run_that_began_anew_may_have_another_base(tmp_path: Path):
    accept_base(tmp_path, "one", resuming=False, accept_changes=False, say=print)
    accept_base(tmp_path, "other", resuming=False, accept_changes=False, say=print)
    assert json.loads((tmp_path / "base.json").read_text()) == {"unet": "other"}


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
