import json

import pytest

from aquatint.config.describe import all_keys, table
from aquatint.config.explain import defaults_json, explanation
from aquatint.config.schema import Config, dump
from aquatint.errors import UsageError


@pytest.mark.parametrize("key", all_keys())
def test_every_setting_and_section_can_be_explained(key):
    text = explanation(key)
    assert key in text
    assert len(text.splitlines()) >= 2


def test_a_setting_comes_with_help_kind_and_default():
    key, doc, kind, default = explanation("training.batch_size").splitlines()
    assert key == "training.batch_size"
    assert doc.startswith("Pictures per forward pass.")
    assert kind == 'write    "auto" or a whole number, at least 1'
    assert default == "default  1"


def test_what_depends_on_the_optimizer_is_said():
    assert "default  0.0 with adafactor" in explanation("optimizer.weight_decay")
    assert 'only with optimizer.name = "adafactor"' in explanation("optimizer.clip_threshold")


def test_required_settings_have_no_default():
    assert "it must be set" in explanation("model.base")
    assert "it must be set" in explanation("data.sources.2.path")


def test_no_key_gives_an_overview_of_everything():
    text = explanation("")
    assert all(key.replace("*", "0") in text for key in all_keys())


def test_an_unknown_key_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"did you mean `ema.decay`\?"):
        explanation("ema.decy")


def test_defaults_with_the_required_settings_are_a_config():
    values = json.loads(defaults_json())
    assert "base" not in values["model"]
    assert "sources" not in values["data"]
    values["model"]["base"], values["data"]["sources"] = "b", [{"path": "p"}]
    minimal = {"model": {"base": "b"}, "data": {"sources": [{"path": "p"}]}}
    assert Config.model_validate(values) == Config.model_validate(minimal)
    assert set(dump(Config.model_validate(minimal))) == {key for key in table().sections if "." not in key}
