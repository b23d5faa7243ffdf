"""`defaults.json` is written from the schema. After a change there: `aquatint config defaults > src/aquatint/config/defaults.json`."""

import json
from importlib.resources import files

from aquatint.cli.main import run
from aquatint.config.describe import table
from aquatint.config.explain import defaults_json


def flat(values, prefix=""):
    found = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def test_the_file_is_what_the_command_prints(capsys):
    written = (files("aquatint.config") / "defaults.json").read_text(encoding="utf-8")
    assert run(["config", "defaults"]) == 0
    assert written == capsys.readouterr().out == defaults_json(), "run: aquatint config defaults > src/aquatint/config/defaults.json"


def test_it_holds_every_setting_with_a_default_and_no_other():
    expected = {key: setting.default for key, setting in table().settings.items() if not setting.required and "*" not in key}
    expected |= {"captions.categories": [], "training.groups": []}  # lists of tables, of which there are none
    assert flat(json.loads(defaults_json())) == expected
