import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.config.describe import all_keys, generic, table
from aquatint.config.load import load_config
from aquatint.config.template import load_preset, preset_for, preset_names, preset_text, render, to_toml


@pytest.fixture(params=preset_names())
def preset(request):
    return load_preset(request.param)


@pytest.mark.parametrize("every_setting", [True, False])
def test_what_init_writes_is_the_preset_as_a_config(preset, every_setting, tmp_path):
    written, original = tmp_path / "run.toml", tmp_path / "preset.toml"
    written.write_text(render(preset, {}, every_setting=every_setting))
    original.write_text(preset_text(preset.name))
    assert load_config(written) == load_config(original)


def test_every_setting_stands_in_it_once_with_its_help(preset):
    text = render(preset, {})
    names = [line.lstrip("# ").partition(" = ")[0] for line in text.splitlines() if " = " in line and not line.startswith("# `")]
    settings = table(preset.values["optimizer.name"]).settings
    settings = {key: setting for key, setting in settings.items() if not key.startswith(("captions.categories.", "training.groups."))}
    expected = sorted(key.rpartition(".")[2] for key in settings)
    assert sorted(name for name in names if name in expected) == expected
    unwrapped = text.replace("\n# ", " ")
    assert all(line in unwrapped for setting in settings.values() for line in setting.doc.split("\n"))


def test_the_defaults_in_comments_are_the_defaults(preset, tmp_path):
    """Taking the # away from every commented setting gives the same config."""
    rows = render(preset, {}).splitlines()
    known = {key.rpartition(".")[2] for key in all_keys()}
    active = [row[2:] if row.startswith("# ") and row[2:].partition(" = ")[0] in known and "(not set)" not in row else row for row in rows]
    assert sum(row.startswith("# ") for row in active) < sum(row.startswith("# ") for row in rows) - 40
    path = tmp_path / "run.toml"
    path.write_text("\n".join(active))
    plain = tmp_path / "plain.toml"
    plain.write_text(preset_text(preset.name))
    assert load_config(path) == load_config(plain)


def test_the_reasons_of_the_preset_stay_beside_its_settings(preset):
    assert preset.reasons
    text = render(preset, {}, every_setting=False)
    assert all(f"  # {reason}\n" in text for reason in preset.reasons.values())
    assert text.startswith(f"# {preset.header.splitlines()[0]}"[:60])


def test_changes_come_on_top_of_the_preset():
    text = render(
        load_preset("full-24gb"), {"model.base": 'C:\\odd "name".safetensors', "data.sources.0.path": "a", "data.sources.1.path": "b"}
    )
    values = tomllib.loads(text)
    assert values["model"]["base"] == 'C:\\odd "name".safetensors'
    assert [source["path"] for source in values["data"]["sources"]] == ["a", "b"]


def test_no_line_is_too_long_to_read():
    assert max(map(len, render(load_preset("full-12gb"), {}).splitlines())) <= 140


@pytest.mark.parametrize(
    ("vram", "name"),
    [(5.9, None), (6, "lora-6gb"), (7.9, "lora-6gb"), (8, "lora-8gb"), (11.9, "lora-8gb"), (12, "full-12gb"), (15, "full-12gb"),
     (16, "full-16gb"), (24, "full-24gb"),
     (47, "full-24gb"), (48, "full-48gb"), (80, "full-80gb"), (141, "full-80gb")],
)  # fmt: skip
def test_the_preset_is_the_largest_that_fits(vram, name):
    found = preset_for(vram)
    assert (found and found.name) == name


def test_an_unknown_preset_is_a_key_error():
    with pytest.raises(KeyError):
        load_preset("../schema")


def test_preset_keys_are_settings(preset):
    assert {generic(key) for key in preset.values} <= set(all_keys())


VALUES = st.one_of(
    st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False, allow_infinity=False), st.text(st.characters(codec="utf-8"))
)


@settings(max_examples=200, deadline=None)
@given(st.one_of(VALUES, st.lists(VALUES, max_size=5)))
def test_any_value_written_as_toml_is_read_back(value):
    assert tomllib.loads(f"value = {to_toml(value)}")["value"] == value


def test_small_numbers_are_written_as_people_write_them():
    assert to_toml(2e-6) == "2e-6"
    assert to_toml(0.9999) == "0.9999"
    assert to_toml(["a", "b"]) == '["a", "b"]'
