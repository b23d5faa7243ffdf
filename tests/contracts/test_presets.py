"""The presets are complete runs that load, contradict nothing, and fit the GPU they are named after."""

import pytest

from aquatint.config.check import REMARKS, find
from aquatint.config.load import load_config
from aquatint.config.template import load_preset, preset_names, preset_text
from aquatint.models.sdxl.model import sdxl_spec
from aquatint.planning.memory import GIB, OUTSIDE_BYTES, frozen_part, state_parts

ACTIVATION_BYTES = {"bf16_pure": 0.75 * GIB, "bf16_mixed": 0.80 * GIB}  # per picture of 1024 squared, with checkpointing
POINTWISE_BYTES = 4.1 * GIB  # if only what is pointwise is computed again
BF16_COPIES_BYTES = {"bf16_pure": 0, "bf16_mixed": 4.8 * GIB}


@pytest.fixture(params=preset_names())
def preset(request, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(preset_text(request.param))
    return load_preset(request.param), load_config(path)


def test_there_is_one_for_each_common_size_of_gpu():
    assert preset_names() == ("lora-6gb", "lora-8gb", "full-12gb", "full-16gb", "full-24gb", "full-48gb", "full-80gb")


def test_a_preset_is_complete_commented_and_free_of_contradictions(preset):
    about, config = preset
    assert about.header.count("\n") >= 2
    assert f"{about.vram_gb} GB" in about.header
    assert list(find(REMARKS, config)) == []
    assert {"model.base", "optimizer.name", "optimizer.learning_rate", "training.length", "training.precision"} <= set(about.values)


def test_a_preset_fits_its_gpu(preset):
    about, config = preset
    weights, optimizer, average = state_parts(config, sdxl_spec())
    on_gpu = average.bytes if config.ema.device == "model" else 0
    precision = config.training.precision
    if config.adapter.kind != "none":
        on_gpu += frozen_part(config, sdxl_spec()).bytes
        precision = "bf16_pure"  # there are no copies of a frozen UNet
    level = config.training.gradient_checkpointing
    assert level
    each = POINTWISE_BYTES if level == "pointwise" else ACTIVATION_BYTES[precision]
    work = config.training.batch_size * each + BF16_COPIES_BYTES[precision]
    gradients = 0 if config.training.fused_backward else weights.bytes
    assert weights.bytes + gradients + optimizer.bytes + on_gpu + work + OUTSIDE_BYTES <= about.vram_gb * GIB


def test_checkpoint_sizes_in_comments_are_true(preset):
    about, config = preset
    size = sum(part.bytes for part in state_parts(config, sdxl_spec())) / 1e9
    assert about.reasons["checkpoints.keep"] == f"about {size:.0f} GB each"


def test_pictures_per_step_in_comments_are_true(preset):
    about, config = preset
    per_step = config.training.batch_size * config.training.accumulation_steps
    assert f"for {per_step} pictures per step" in about.reasons["optimizer.learning_rate"]
    assert config.optimizer.learning_rate <= 1.5e-6 * per_step**0.5 * 1.34 or config.adapter.kind != "none"
