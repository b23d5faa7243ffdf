import pytest

from aquatint.config.check import RULES, find
from aquatint.planning.knobs import KNOBS, changes_text, with_changes

from .small import config

EVERYTHING = {
    "training": {"batch_size": 4, "accumulation_steps": 2, "gradient_checkpointing": False},
    "samples": {"prompts": ["a cat"]},
    "ema": {"power_stds": [0.1]},
}


def levels(name, settings):
    return next(knob for knob in KNOBS if knob.name == name).levels(settings)


@pytest.mark.parametrize("settings", [config(**EVERYTHING), config()])
def test_every_level_changes_something_has_a_price_and_contradicts_nothing(settings):
    for knob in KNOBS:
        found = knob.levels(settings)
        assert [level.cost for level in found] == sorted(level.cost for level in found)
        for level in found:
            changed = with_changes(settings, level.changes)
            assert changed != settings
            assert level.price
            assert list(find(RULES, changed)) == []


def test_what_is_set_already_is_not_offered():
    settings = config(
        training={"precision": "bf16_pure", "fused_backward": True, "clip": "delayed"},
        optimizer={"name": "adafactor"}, ema={"enabled": False}, cache={"batch_size": 1, "vae_precision": "bfloat16"},
    )  # fmt: skip
    assert [knob.name for knob in KNOBS if knob.levels(settings)] == []


def test_every_batch_keeps_the_number_of_pictures_per_step():
    settings = config(training={"batch_size": 4, "accumulation_steps": 3})
    found = [(level.changes["training.batch_size"], level.changes["training.accumulation_steps"], level.cost) for level in
             levels("batch and accumulation", settings)]  # fmt: skip
    assert {size * steps for size, steps, _ in found} == {12}
    assert [size for size, _, cost in found if cost == 0] == [12, 6]
    assert [(size, cost) for size, _, cost in found if cost] == [(3, 8), (2, 8), (1, 16)]


def test_no_batch_is_offered_that_no_card_holds():
    found = levels("batch and accumulation", config(training={"batch_size": 2, "accumulation_steps": 500}))
    assert max(level.changes["training.batch_size"] for level in found) == 50


def test_a_step_inside_the_backward_pass_brings_a_clip_that_it_can_do():
    def changes(**training):
        return [level.changes for level in levels("step inside the backward pass", config(training=training))]

    assert changes() == [{"training.fused_backward": True, "training.clip": "delayed"}]
    assert changes(clip="per_tensor") == changes(clip_norm=0.0) == [{"training.fused_backward": True}]


def test_bf16_weights_bring_an_optimizer_that_rounds_with_care():
    (level,) = levels("precision of weights", config())
    assert level.changes == {"training.precision": "bf16_pure", "optimizer.name": "adamw_bf16"}
    (level,) = levels("precision of weights", config(optimizer={"name": "adafactor"}))
    assert level.changes == {"training.precision": "bf16_pure"}
    assert levels("precision of weights", config(adapter={"kind": "lora"})) == ()


def test_sample_pictures_become_smaller_and_keep_their_shape():
    found = levels("sample pictures", config(samples={"prompts": ["a"], "height": 1024, "width": 768}))
    assert [(level.changes.get("samples.height"), level.changes.get("samples.width")) for level in found] == [
        (768, 576),
        (512, 384),
        (None, None),
    ]
    assert with_changes(config(**EVERYTHING), found[-1].changes).samples.every is None


def test_another_optimizer_keeps_the_learning_rate_and_nothing_else():
    changed = with_changes(config(optimizer={"learning_rate": 3e-5, "eps": 1e-6}), {"optimizer.name": "adafactor"})
    assert changed.optimizer.name == "adafactor"
    assert changed.optimizer.learning_rate == 3e-5


def test_changes_are_written_as_overrides():
    changes = {"training.fused_backward": True, "samples.every": None, "cache.batch_size": 1, "ema.device": "cpu"}
    assert changes_text(changes) == "training.fused_backward=true samples.every=never cache.batch_size=1 ema.device=cpu"


def test_a_rate_that_means_something_else_is_not_carried_over():
    assert (
        with_changes(config(optimizer={"name": "lion", "learning_rate": 3e-6}), {"optimizer.name": "adamw8bit"}).optimizer.learning_rate
        == 3e-6
    )
    for name in ("prodigy", "torch_adafactor"):
        assert with_changes(config(optimizer={"name": name}), {"optimizer.name": "adamw8bit"}).optimizer.learning_rate == 1e-5


def test_bf16_weights_bring_another_optimizer_than_that_of_a_library():
    (level,) = levels("precision of weights", config(optimizer={"name": "lion"}))
    assert level.changes == {"training.precision": "bf16_pure", "optimizer.name": "adamw_bf16"}
