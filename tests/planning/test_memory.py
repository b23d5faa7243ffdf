from math import prod

import pytest
import torch

from aquatint.errors import UsageError
from aquatint.models.sdxl.model import build_unet, sdxl_spec
from aquatint.optim import flat
from aquatint.optim.create import create_optimizer
from aquatint.planning.disk import cache_bytes_per_picture, checkpoint_bytes, export_bytes, plan_disk
from aquatint.planning.memory import (
    GIB,
    OUTSIDE_BYTES,
    PROCESS_BYTES,
    MemoryPlan,
    Part,
    Phase,
    Tracer,
    largest_bucket,
    plan_memory,
    state_parts,
    update_bytes,
)
from aquatint.planning.schedule import plan_steps
from aquatint.planning.trace import Tally
from aquatint.training.ema import Ema

from .small import StubTracer, config, small_spec

PURE = {"precision": "bf16_pure"}


def plan(**sections):
    return plan_memory(config(**sections), sdxl_spec(), StubTracer(sdxl_spec()))


def phase(memory, name):
    return {part.name: part.bytes for part in next(phase for phase in memory.phases if phase.name == name).parts}


@pytest.mark.parametrize(
    ("training", "optimizer", "expected"),
    [
        (PURE, "adamw_bf16", (4.78, 9.56)),
        (PURE, "adamw", (4.78, 9.56)),
        (PURE, "adamw8bit", (4.78, 4.86)),
        (PURE, "soap", (4.78, 22.84)),
        (PURE, "adafactor", (4.78, 0.01)),
        ({"precision": "bf16_mixed"}, "adamw", (9.56, 19.13)),
        ({"precision": "fp32"}, "adafactor", (9.56, 0.01)),
    ],
)
def test_the_full_size_unet_weighs_what_was_measured(training, optimizer, expected):
    weights, state, average = state_parts(config(training=training, optimizer={"name": optimizer}), sdxl_spec())
    assert (weights.bytes / GIB, state.bytes / GIB) == pytest.approx(expected, abs=0.01)
    assert average.bytes / GIB == pytest.approx(9.56, abs=0.01)


def storage(tensors):
    """The bytes of all storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("precision", ["bf16_pure", "bf16_mixed", "fp32"])
@pytest.mark.parametrize(
    ("optimizer", "extra"),
    [("adamw", {}), ("adamw_bf16", {}), ("adamw_bf16", {"rounding": "kahan"}), ("adamw8bit", {}), ("adafactor", {}), ("soap", {})],
)
def test_weights_gradients_state_and_average_are_those_of_the_real_thing(precision, optimizer, extra):
    settings = config(training={"precision": precision}, optimizer={"name": optimizer, **extra}, ema={"power_stds": [0.1]})
    dtype = torch.bfloat16 if precision == "bf16_pure" else torch.float32
    unet = build_unet(small_spec()).to_empty(device="cpu").to(dtype)
    real = create_optimizer(optimizer, unet.named_parameters(), seed=0, **settings.optimizer.model_dump(exclude={"name"}))
    for weight in unet.parameters():
        weight.data.zero_()
        weight.grad = torch.zeros_like(weight)
    real.step()
    ema = Ema(dict(unet.named_parameters()), decay=0.9, warmup=False, device=None, power_stds=(0.1,))
    weights, state, average = state_parts(settings, small_spec())
    assert weights.bytes == pytest.approx(storage(unet.parameters()), rel=0.01)
    assert weights.bytes == pytest.approx(storage(weight.grad for weight in unet.parameters()), rel=0.01)
    assert state.bytes == pytest.approx(
        storage(t for entry in real.state.values() for t in entry.values() if hasattr(t, "nbytes")), rel=0.01
    )
    assert average.bytes == pytest.approx(storage(t for table in ema.tables().values() for t in table.values()), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("optimizer", "extra"),
    [("adamw", {}), ("adamw_bf16", {}), ("adamw_bf16", {"rounding": "kahan"}), ("adamw8bit", {}), ("adafactor", {}), ("soap", {})],
)
def test_what_an_update_takes_for_a_moment_is_what_the_plan_has_for_it(monkeypatch, dtype, optimizer, extra):
    monkeypatch.setattr(flat, "CPU_PIECE", 1 << 40)  # all at once, as on a GPU
    precision = "bf16_pure" if dtype == torch.bfloat16 else "fp32"
    settings = config(training={"precision": precision}, optimizer={"name": optimizer, **extra})
    weight = torch.nn.Parameter(torch.zeros(1536, 512, dtype=dtype))
    real = create_optimizer(optimizer, [("weight", weight)], seed=0, **settings.optimizer.model_dump(exclude={"name"}))
    peaks = []
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        tally = Tally([weight, weight.grad, *(t for entry in real.state.values() for t in entry.values() if hasattr(t, "nbytes"))])
        with tally.counting():
            real.step()
        peaks.append(tally.peak)
    assert peaks[1] / weight.numel() <= update_bytes(settings) <= 1.2 * peaks[1] / weight.numel() + 1


def test_on_a_cpu_updates_are_made_in_pieces_that_do_not_count():
    assert update_bytes(config(training={"device": "cpu"})) == 0


def test_the_average_counts_where_it_lives():
    assert phase(plan(), "training")["moving average"] > 9 * GIB
    assert "moving average" not in phase(plan(ema={"device": "cpu"}), "training")
    assert "moving average" not in phase(plan(ema={"enabled": False}), "training")


def test_further_averages_count_like_the_first():
    power = {"power_stds": [0.05, 0.1]}
    assert phase(plan(ema=power), "training")["moving average"] == 3 * phase(plan(), "training")["moving average"]
    assert "moving average" not in phase(plan(ema={**power, "device": "cpu"}), "training")
    one = checkpoint_bytes(config(), sdxl_spec()) - checkpoint_bytes(config(ema={"enabled": False}), sdxl_spec())
    assert checkpoint_bytes(config(ema=power), sdxl_spec()) == checkpoint_bytes(config(), sdxl_spec()) + 2 * one


def test_each_phase_counts_only_what_is_there_at_that_time():
    memory = plan(samples={"prompts": ["a cat"]})
    assert [phase.name for phase in memory.phases] == ["encoding captions", "encoding pictures", "training", "making sample pictures"]
    assert set(phase(memory, "encoding captions")) == {"text encoders"}
    assert phase(memory, "encoding captions")["text encoders"] == pytest.approx(4 * (123_060_480 + 694_659_840), rel=1e-6)
    assert set(phase(memory, "encoding pictures")) == {"autoencoder", "work space"}
    assert phase(memory, "encoding pictures")["autoencoder"] == 4 * 83_653_863
    assert "gradients and activations" not in phase(memory, "making sample pictures")


@pytest.mark.parametrize("samples", [{}, {"prompts": ["a cat"], "every": "never"}])
def test_without_sample_pictures_there_is_no_phase_for_them(samples):
    assert len(plan(samples=samples).phases) == 3


def test_the_largest_phase_decides_and_a_card_is_named():
    memory = MemoryPlan((Phase("a", (Part("x", 5 * GIB), Part("y", 6 * GIB))), Phase("b", (Part("z", 7 * GIB),))), (8, 8))
    assert memory.largest.name == "a"
    assert memory.largest.bytes == 11 * GIB
    assert memory.needed == 11 * GIB + OUTSIDE_BYTES
    assert memory.card_gib == 16
    assert MemoryPlan((Phase("a", (Part("x", 500 * GIB),)),), (8, 8)).card_gib is None


def test_on_a_cpu_everything_of_the_process_counts():
    there = {"training": {"device": "cpu"}, "samples": {"prompts": ["a cat"]}}
    memory = plan(**there)
    assert (memory.outside, memory.on_gpu) == (PROCESS_BYTES, False)
    assert "moving average" in phase(plan(**there, ema={"device": "cpu"}), "training")
    weights = phase(memory, "training")["weights"]
    assert phase(memory, "making sample pictures")["weights set aside"] == phase(memory, "validating")["weights set aside"] == weights
    assert "weights set aside" not in phase(plan(**there, ema={"enabled": False}), "making sample pictures")
    assert "validating" not in [phase.name for phase in plan(**there, validation={"every": "never"}).phases]


def test_the_base_counts_twice_if_it_says_what_stays_outside_of_masks():
    masked = {"diffusion": {"mask_prior_weight": 0.5}}
    assert phase(plan(**masked), "training")["base model, for masks"] == 2 * sdxl_spec().num_parameters("unet")
    assert "base model, for masks" not in phase(plan(), "training")


def test_autocast_keeps_copies_of_float32_weights_while_sample_pictures_are_made():
    samples = {"prompts": ["a cat"]}
    mixed, exact = (phase(plan(samples=samples, training={"precision": name}), "making sample pictures") for name in ("bf16_mixed", "fp32"))
    assert mixed["work space"] == 2 * sdxl_spec().num_parameters("unet") + GIB // 2
    assert exact["work space"] == 3 * GIB  # decoding


def test_after_an_ordinary_pass_all_gradients_and_the_largest_update_are_there_at_once():
    sizes = {"buckets": {"resolution": 64, "min_side": 64}, "optimizer": {"name": "adamw8bit"}}
    settings = config(**sizes, training=PURE)
    largest = max(prod(shape) for shape in small_spec().shapes("unet").values())
    gradients = 2 * small_spec().num_parameters("unet")
    assert Tracer(small_spec()).step(settings, (64, 64)).peak == gradients + update_bytes(settings) * largest


def test_the_largest_bucket_is_the_square_if_there_is_one():
    assert largest_bucket(config()) == (1024, 1024)
    assert largest_bucket(config(buckets={"resolution": 512, "min_side": 256})) == (512, 512)


def test_buckets_that_cannot_be_are_a_usage_error():
    with pytest.raises(UsageError):
        largest_bucket(config(buckets={"resolution": 256}))


def test_traces_are_made_once():
    calls = []
    tracer = Tracer(small_spec())

    def function(spec, size):
        calls.append(size)
        return size

    assert [tracer._once(function, {"size": size}) for size in (1, 2, 1)] == [1, 2, 1]
    assert calls == [1, 2]


def test_a_small_model_is_planned_from_end_to_end():
    sizes = {"buckets": {"resolution": 256, "min_side": 128}, "samples": {"prompts": ["a"], "height": 128, "width": 128}}
    settings = config(**sizes, training={"accumulation_steps": 2})
    memory = plan_memory(settings, small_spec())
    assert memory.size_hw == (256, 256)
    assert all(part.bytes > 0 for phase in memory.phases for part in phase.parts)


def test_a_checkpoint_holds_weights_state_and_average():
    assert checkpoint_bytes(config(), sdxl_spec()) / GIB == pytest.approx(9.56 + 19.13 + 9.56, abs=0.03)
    assert checkpoint_bytes(config(ema={"enabled": False}), sdxl_spec()) / GIB == pytest.approx(9.56 + 19.13, abs=0.03)


def test_the_disk_plan_counts_every_checkpoint_and_export():
    parts = plan_disk(config(checkpoints={"keep": 3}, export={"diffusers_folder": True}), sdxl_spec(), 100)
    by_name = {part.name: part.bytes for part in parts}
    assert by_name["checkpoints"] == 4 * checkpoint_bytes(config(), sdxl_spec())
    assert by_name["exported model"] == 2 * export_bytes(config(), sdxl_spec())
    assert export_bytes(config(), sdxl_spec()) == pytest.approx(6.94e9, rel=0.01)  # what SDXL 1.0 in float16 weighs


@pytest.mark.parametrize(
    ("every", "expected"), [("300 steps", 4), ("250 steps", 4), ("900 samples", 5), ("2 epochs", 2), ("1 sample", 1000)]
)
def test_the_disk_plan_counts_snapshots_of_averages(every, expected):
    settings = config(ema={"power_stds": [0.05, 0.1], "snapshot_every": every})
    steps = plan_steps(1000, 2, 2, settings.training.length)
    parts = {part.name: part for part in plan_disk(settings, sdxl_spec(), 100, steps)}
    assert parts["averages to choose from"].bytes == expected * 2 * 2 * sdxl_spec().num_parameters("unet")
    assert "averages to choose from" not in {part.name for part in plan_disk(config(), sdxl_spec(), 100, steps)}


def test_a_cached_picture_weighs_its_latent_and_caption():
    latent, text = 2 * 4 * 128 * 128 * 2, (77 * 2048 + 1280) * 2
    assert cache_bytes_per_picture(config(), sdxl_spec()) == latent + text
    more = config(crop={"mode": "random", "variants": 3, "flip_prob": 0.5}, captions={"variants": 2}, cache={"text_dtype": "float32"})
    assert cache_bytes_per_picture(more, sdxl_spec()) == 6 * latent + 2 * 2 * text
