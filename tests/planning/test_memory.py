import pytest

from aquatint.errors import UsageError
from aquatint.models.sdxl.model import build_unet, sdxl_spec
from aquatint.planning.disk import cache_bytes_per_picture, checkpoint_bytes, export_bytes, plan_disk
from aquatint.planning.memory import (
    GIB,
    MemoryPlan,
    Part,
    Phase,
    Tracer,
    largest_bucket,
    plan_memory,
    savings,
    state_parts,
    with_changes,
)
from aquatint.planning.schedule import plan_steps

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


@pytest.mark.parametrize("precision", ["bf16_pure", "fp32"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16", "adamw8bit", "adafactor", "soap"])
def test_weights_and_optimizer_state_are_those_of_the_real_thing(precision, optimizer):
    import torch

    from aquatint.optim.create import create_optimizer

    settings = config(training={"precision": precision}, optimizer={"name": optimizer})
    dtype = torch.bfloat16 if precision == "bf16_pure" else torch.float32
    unet = build_unet(small_spec()).to_empty(device="cpu").to(dtype)
    real = create_optimizer(optimizer, unet.named_parameters(), seed=0, **settings.optimizer.model_dump(exclude={"name"}))
    for weight in unet.parameters():
        weight.data.zero_()
        weight.grad = torch.zeros_like(weight)
    real.step()
    weights, state, _ = state_parts(settings, small_spec())
    assert weights.bytes == sum(p.nbytes for p in unet.parameters())
    assert state.bytes == sum(t.nbytes for entry in real.state.values() for t in entry.values() if isinstance(t, torch.Tensor))


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
    assert memory.card_gib == 16
    assert MemoryPlan((Phase("a", (Part("x", 500 * GIB),)),), (8, 8)).card_gib is None


def test_the_largest_bucket_is_the_square_if_there_is_one():
    assert largest_bucket(config()) == (1024, 1024)
    assert largest_bucket(config(buckets={"resolution": 512, "min_side": 256})) == (512, 512)


def test_buckets_that_cannot_be_are_a_usage_error():
    with pytest.raises(UsageError):
        largest_bucket(config(buckets={"resolution": 256}))


def test_savings_save_and_say_what_they_cost():
    before = plan()
    found = savings(config(), sdxl_spec(), StubTracer(sdxl_spec()))
    assert found[0].change == "ema.device = cpu"
    assert all(saving.plan.largest.bytes < before.largest.bytes for saving in found)
    assert all(saving.price for saving in found)
    assert min(saving.plan.largest.bytes for saving in found) == found[-1].plan.largest.bytes < 13 * GIB


def test_nothing_is_offered_that_is_set_already_or_helps_nothing():
    smallest = config(
        training=PURE, optimizer={"name": "adafactor"}, ema={"device": "cpu"}, cache={"batch_size": 1, "vae_precision": "bfloat16"}
    )
    assert savings(smallest, sdxl_spec(), StubTracer(sdxl_spec())) == ()
    off = config(training={"gradient_checkpointing": False})
    changes = [saving.change for saving in savings(off, sdxl_spec(), StubTracer(sdxl_spec()))]
    assert "training.gradient_checkpointing = True" in changes
    assert "cache.batch_size = 1" not in changes


def test_another_optimizer_keeps_the_learning_rate_and_nothing_else():
    changed = with_changes(config(optimizer={"learning_rate": 3e-5, "eps": 1e-6}), {"optimizer.name": "adafactor"})
    assert changed.optimizer.name == "adafactor"
    assert changed.optimizer.learning_rate == 3e-5


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
