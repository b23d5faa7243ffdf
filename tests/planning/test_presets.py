"""Every preset, traced at full size: it fits its card, with the room that it says."""

import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from aquatint.config.schema import Config
from aquatint.models.sdxl.model import sdxl_spec
from aquatint.planning.memory import GIB, plan_memory

PRESETS = sorted((entry for entry in (files("aquatint.config") / "presets").iterdir() if entry.name.endswith(".toml")), key=str)
GUIDE = Path(__file__).parents[2] / "docs" / "memory.md"
SPARE_BYTES = GIB  # beside what the plan has for the driver; a LoRA on 8 GB has to do with less


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_a_preset_fits_the_card_in_its_name_also_while_it_encodes_and_samples(preset):
    text = preset.read_text()
    values = tomllib.loads(text)
    values["model"], values["data"] = {"base": "base.safetensors"}, {"sources": [{"path": "pictures"}]}
    values["samples"] = {**values.get("samples", {}), "prompts": ["a", "b", "c", "d"]}
    card = int(re.search(r"(\d+)gb", preset.name)[1]) * GIB
    plan = plan_memory(Config.model_validate(values), sdxl_spec())
    assert plan.size_hw == (1024, 1024)
    assert plan.needed <= card
    if said := re.search(r"The plan: ([0-9.]+) GiB at most", text):
        assert plan.needed / GIB <= float(said[1]) <= plan.needed / GIB + 0.1
        assert plan.needed + SPARE_BYTES <= card
    assert said or "lora" in preset.name
    row = re.search(rf"^\| `{preset.name.removesuffix('.toml')}` \|.*\| ([0-9.]+) GiB \|$", GUIDE.read_text(), re.MULTILINE)
    assert plan.needed / GIB <= float(row[1]) <= plan.needed / GIB + 0.1
