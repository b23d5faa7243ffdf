import subprocess
import sys

import pytest

from aquatint.models.sdxl.model import sdxl_spec
from aquatint.planning import report
from aquatint.planning.fit import mild_helps
from aquatint.planning.memory import plan_memory
from aquatint.planning.report import plan_text

from .small import StubTracer, config, small_spec


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(20):
        (folder / f"{index}.png").touch()
    (folder / "notes.txt").touch()
    return folder


@pytest.fixture
def _small(monkeypatch):
    monkeypatch.setattr(report, "sdxl_spec", small_spec)


def small_config(folder, **sections):
    source = {"path": str(folder), "repeats": 3}
    return config(
        **{
            "run": {"name": "portrait"}, "data": {"sources": [source]}, "buckets": {"resolution": 256, "min_side": 128},
            "training": {"length": "10 epochs", "batch_size": 2}, **sections,
        }
    )  # fmt: skip


@pytest.mark.usefixtures("_small")
def test_the_plan_says_steps_memory_time_and_disk_without_any_weights(pictures):
    text = plan_text(small_config(pictures, validation={"share": 0.1}))
    assert text.startswith("Plan of `portrait`\n  /none/base.safetensors is not there: the sizes are those of SDXL 1.0\n")
    assert f"{pictures}: 20 pictures × 3 repeats = 60" in text
    assert "about 2 pictures of these for validation only" in text
    assert "an epoch is 54 samples ÷ 2 = 27 steps" in text
    assert "270 steps" in text
    for part in (
        "encoding pictures",
        "training",
        "weights",
        "optimizer state",
        "moving average",
        "gradients and activations",
        "\n\nMain memory\n  program",
        "checkpoints",
        "\n\nTime\n  counted in the network itself, for the largest bucket (256 × 256 pixels)",
        "× 2 samples = ",
        "× 270 steps = ",
        "RTX 3090",
    ):
        assert part in text
    assert "a card with 8 GB should do" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_what_would_need_less_is_listed_with_its_price():
    spec = sdxl_spec()
    lines = report.saving_lines(list(mild_helps(config(), spec, StubTracer(spec))))
    assert lines[1] == "to need less (all in all, with each alone):"
    assert any(line.endswith("ema.device=cpu (a second or so more per step, and its size in main memory)") for line in lines)
    assert report.saving_lines([]) == []


def test_a_run_on_a_cpu_is_planned_in_main_memory():
    spec = sdxl_spec()
    plan = plan_memory(config(training={"device": "cpu"}), spec, StubTracer(spec))
    assert report.place(plan) == "Main memory"
    assert report.memory_lines(plan, 1)[-1].endswith("workers of the loader not counted")


def test_folders_without_pictures_can_be_planned(tmp_path):
    assert report.plan_of_steps(small_config(tmp_path), [0]) is None
    assert report.steps_lines(small_config(tmp_path), [0], None)[-1] == "there is nothing to train on yet"


def test_a_base_that_is_there_gives_the_sizes(tmp_path, monkeypatch):
    base = tmp_path / "base.safetensors"
    base.touch()

    class Opened:
        spec = small_spec()

    monkeypatch.setattr(report, "open_base", lambda path, vae: Opened if path == base and vae is None else None)
    assert report.find_spec(config(model={"base": str(base)})) == (Opened.spec, "")


def test_importing_the_plan_loads_no_torch():
    code = "import sys, aquatint.planning.report, aquatint.planning.trace; print('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
