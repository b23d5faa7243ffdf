import pytest

from aquatint.config.load import load_config
from aquatint.errors import UsageError
from aquatint.models.sdxl.model import sdxl_spec
from aquatint.planning.fit import fit
from aquatint.planning.fit_report import fit_text, fitted_config, parse_size, vram_text
from aquatint.planning.memory import GIB, plan_memory

from .small import StubTracer, config

SPEC = sdxl_spec()
TRACER = StubTracer(SPEC)
WRITTEN = """
[model]
base = "base.safetensors"

[[data.sources]]
path = "pictures"
repeats = 2.0

[[data.sources]]
path = "more"

[captions]
shuffle = true
style = "tags"

[[captions.categories]]
tags = ["artist:*"]
drop_prob = 0.5

[optimizer]
learning_rate = 3e-6
betas = [0.9, 0.99]

[validation]
every = "never"

[samples]
prompts = ["a cat"]
"""


@pytest.fixture
def written(tmp_path):
    (tmp_path / "run.toml").write_text(WRITTEN)
    return load_config(tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("text", "expected"), [("12GiB", 12 * GIB), ("12GB", 12 * GIB), ("12", 12 * GIB), (" 7.5 gib ", 15 * GIB // 2), ("800 MiB", 800 << 20)]
)
def test_sizes_are_read(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "twelve", "12 TB", "-3", "0", "1e3", "12GiB24"])
def test_what_is_no_size_is_refused_with_a_hint(text):
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert "12GiB" in caught.value.hint


def test_every_phase_is_said_to_fit_or_by_how_much_it_does_not():
    plan = plan_memory(config(), SPEC, TRACER)
    text = vram_text(config(), SPEC, 48 * GIB, TRACER)
    assert text.startswith("GPU memory of `run`, of 48.00 GiB\n")
    missing = (plan.needed - 48 * GIB) / GIB
    assert missing <= 0 or f"training {'':16}" in text
    small = vram_text(config(), SPEC, 24 * GIB, TRACER)
    assert f"{(plan.needed - 24 * GIB) / GIB:.2f} GiB too much" in small
    assert small.count("fits, ") == 2
    assert "no single setting is enough: `--fit 24GiB`" in small
    assert "saves 9.56 GiB   ema.device=cpu (" in small


def test_the_cheapest_setting_that_is_enough_comes_last():
    needed = plan_memory(config(), SPEC, TRACER).needed
    last = vram_text(config(), SPEC, needed - 4 * GIB, TRACER).splitlines()[-1]
    assert last.endswith(": enough")
    assert "training.fused_backward=true training.clip=delayed" in last


def test_what_fits_gets_no_advice():
    assert "to make it fit" not in vram_text(config(), SPEC, 100 * GIB, TRACER)


def test_a_cpu_has_main_memory():
    assert vram_text(config(training={"device": "cpu"}), SPEC, 100 * GIB, TRACER).startswith("Main memory of `run`")


def test_the_settings_are_listed_with_their_prices_and_in_one_line(written):
    found = fit(written, SPEC, 24 * GIB, TRACER)
    text = fit_text(found, written, SPEC, TRACER)
    assert "all in one line: " in text
    assert all(level.price in text for level in found.turned)
    assert text.count("too much") == 0
    assert "fits into 100.00 GiB as it is" in fit_text(fit(written, SPEC, 100 * GIB, TRACER), written, SPEC, TRACER)


def test_settings_that_another_optimizer_does_not_have_are_to_be_taken_out(written):
    found = fit(written, SPEC, 11 * GIB, TRACER)
    assert found.config.optimizer.name == "adafactor"
    assert "take out of the file: optimizer.betas" in fit_text(found, written, SPEC, TRACER)


def test_the_line_of_overrides_gives_what_was_planned(tmp_path, written):
    found = fit(written, SPEC, 24 * GIB, TRACER)
    line = fit_text(found, written, SPEC, TRACER).splitlines()[-1].partition("all in one line: ")[2]
    again = load_config(tmp_path / "run.toml", line.split())
    assert plan_memory(again, SPEC, TRACER) == found.plan


@pytest.mark.parametrize("gib", [100, 24, 20])
def test_the_written_config_is_the_one_that_was_planned(tmp_path, written, gib):
    found = fit(written, SPEC, gib * GIB, TRACER)
    text = fitted_config(found, written)
    path = tmp_path / "elsewhere" / "fitted.toml"
    path.parent.mkdir()
    path.write_text(text)
    assert load_config(path) == found.config
    assert all(f"# {level.price}" in text for level in found.turned)


def test_if_nothing_fits_the_error_says_the_least_and_a_way_out(written):
    found = fit(written, SPEC, 7 * GIB, TRACER)
    with pytest.raises(UsageError, match=r"does not fit into 7\.00 GiB: the least is") as caught:
        fit_text(found, written, SPEC, TRACER)
    assert caught.value.hint
