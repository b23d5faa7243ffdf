import re
import tomllib
from importlib.resources import files

import pytest

from aquatint.config.schema import Config
from aquatint.models.sdxl.model import sdxl_spec
from aquatint.planning.memory import OUTSIDE_BYTES, plan_memory

PRESETS = sorted((entry for entry in (files("aquatint.config") / "presets").iterdir() if entry.name.endswith(".toml")), key=str)
GIB = 1 << 30


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_a_preset_fits_the_card_in_its_name_also_while_it_encodes_and_samples(preset):
    values = tomllib.loads(preset.read_text())
    values["model"], values["data"] = {"base": "base.safetensors"}, {"sources": [{"path": "pictures"}]}
    values["samples"] = {**values.get("samples", {}), "prompts": ["a", "b", "c", "d"]}
    card = int(re.search(r"(\d+)gb", preset.name)[1]) * GIB
    assert plan_memory(Config.model_validate(values), sdxl_spec()).largest.bytes + OUTSIDE_BYTES <= card
