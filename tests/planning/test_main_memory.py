import tomllib
from importlib.resources import files

import pytest

from aquatint.config.schema import Config
from aquatint.models.sdxl.model import sdxl_spec
from aquatint.planning.main_memory import WORKER_BYTES, machine_bytes, plan_main_memory, shortage
from aquatint.planning.memory import GIB, MemoryPlan, Part, Phase
from aquatint.planning.report import main_memory_lines

from .small import config

SPEC = sdxl_spec()
UNET = SPEC.num_parameters("unet")
QUIET = {"validation": {"every": None}}
PRESETS = sorted((entry for entry in (files("aquatint.config") / "presets").iterdir() if entry.name.endswith(".toml")), key=str)


def parts(**sections):
    return {part.name: part.bytes for part in plan_main_memory(config(**sections), SPEC).parts}


def test_at_the_least_the_weights_pass_through():
    assert parts(**QUIET)["UNet"] == 4 * UNET
    assert parts(**QUIET, training={"precision": "bf16_pure"}, optimizer={"name": "adafactor"})["UNet"] == 2 * UNET


def test_an_average_there_and_weights_that_make_room_for_it_are_counted():
    found = parts(ema={"device": "cpu"})
    assert found["moving average"] == found["weights set aside"] == 4 * UNET
    assert "UNet" not in found, "it is on the GPU long before"
    assert "weights set aside" not in parts(ema={"device": "cpu"}, **QUIET)
    assert "weights set aside" not in parts(ema={"enabled": False})


def test_moments_there_are_counted():
    assert parts(**QUIET, memory={"optimizer_state": "cpu"})["optimizer state"] == pytest.approx(8 * UNET, rel=1e-4)


def test_batches_that_wait_are_counted():
    found = parts(ema={"device": "cpu"}, loader={"workers": 3, "prefetch": 5}, training={"batch_size": 4})
    picture = 2 * 4 * 128 * 128 * 4 + 2 * (77 * 2048 + 1280)  # latents and noise in float32, texts in float16
    assert found["batches read ahead"] == (3 * 5 + 2) * 4 * picture
    assert found["processes that read them"] == 3 * WORKER_BYTES
    online = parts(ema={"device": "cpu"}, loader={"workers": 0}, captions={"text": "online"}, cache={"memory_mib": 100})
    assert online["batches read ahead"] == 3 * 2 * 4 * 128 * 128 * 4 + (100 << 20)
    assert "processes that read them" not in online


def test_the_copy_of_a_checkpoint_is_told_apart_because_a_run_goes_without():
    bytes_saved = (4 + 8 + 4) * UNET
    assert plan_main_memory(config(), SPEC).copy == pytest.approx(bytes_saved, rel=1e-4)
    assert plan_main_memory(config(checkpoints={"background": False}), SPEC).copy == 0
    on_cpu = {"training": {"device": "cpu"}}
    assert plan_main_memory(config(**on_cpu), SPEC).copy == 0
    assert plan_main_memory(config(**on_cpu, checkpoints={"background": True}), SPEC).copy == pytest.approx(bytes_saved, rel=1e-4)


def test_on_a_cpu_it_is_the_run_itself_and_what_reads_for_it():
    plan = MemoryPlan((Phase("training", (Part("weights", 10 * GIB),)),), (1024, 1024), outside=GIB, on_gpu=False)
    found = plan_main_memory(config(training={"device": "cpu"}), SPEC, plan)
    assert [part.name for part in found.parts] == ["the run itself", "batches read ahead", "processes that read them"]
    assert found.parts[0].bytes == 11 * GIB


def test_a_machine_that_has_less_is_warned_of():
    found = plan_main_memory(config(ema={"device": "cpu"}), SPEC)
    assert shortage(found, found.bytes) is None is shortage(found, None)
    assert shortage(found, 16 * GIB) == f"the run takes {found.bytes / GIB:.2f} GiB of main memory, and this machine has 16.00 GiB"
    assert main_memory_lines(found, 16 * GIB)[-1].startswith("warning: the run takes ")
    assert main_memory_lines(found, None)[-1].endswith("more, where they are free, hold what is saved while training goes on")
    assert "more" not in main_memory_lines(plan_main_memory(config(checkpoints={"background": False}), SPEC), None)[-1]


def test_this_machine_has_some():
    assert (machine_bytes() or 0) > GIB


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_no_preset_wants_more_main_memory_than_a_machine_for_its_card_has(preset):
    """A LoRA, or a GPU of 12 GB, stands in machines with 16 GB; larger ones have at least as much as their card and 16 more."""
    values = tomllib.loads(preset.read_text())
    values["model"], values["data"] = {"base": "base.safetensors"}, {"sources": [{"path": "pictures"}]}
    values["samples"] = {**values.get("samples", {}), "prompts": ["a", "b", "c", "d"]}
    card = int("".join(filter(str.isdigit, preset.name)))
    assert plan_main_memory(Config.model_validate(values), SPEC).bytes < max(16, min(card, 32)) * GIB
