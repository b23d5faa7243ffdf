"""What a plan says of trained text encoders: the bytes of the real tensors, and what makes it fit without them."""

from math import prod

import pytest
import torch

from aquatint.config.check import RULES, find
from aquatint.models.sdxl.conditioning import take_off_unheard
from aquatint.models.sdxl.model import build_text_encoders, build_unet, sdxl_spec
from aquatint.models.sdxl.shapes import TEXT_ENCODERS
from aquatint.optim.create import create_optimizer
from aquatint.planning.disk import cache_bytes_per_picture, export_bytes
from aquatint.planning.groups import group_findings, own_settings, table
from aquatint.planning.knobs import KNOBS, with_changes
from aquatint.planning.memory import plan_memory, resident_parts, state_parts
from aquatint.planning.trace import trace_step
from aquatint.planning.trained import num_frozen, num_frozen_text, num_trained, trainable_shapes, trained_shapes
from aquatint.training.parallelize import trained_parameters

from .small import StubTracer, config, small_spec

BOTH = {"train": ["text_encoder_2", "text_encoder"]}
ONE = {"train": ["text_encoder"]}
SMALL = {"dtype": torch.float32, "autocast": False, "checkpointing": False, "batch_size": 2, "size_hw": (64, 96)}


def real(texts) -> torch.nn.Module:
    """A UNet with text encoders of random weights as its children."""
    unet, encoders = build_unet(small_spec()), build_text_encoders(small_spec())
    take_off_unheard(encoders[0])
    for name, encoder in zip(TEXT_ENCODERS, encoders, strict=True):
        if name in texts["train"]:
            unet.add_module(name, encoder)
    return unet.to_empty(device="cpu")


@pytest.mark.parametrize("texts", [BOTH, ONE], ids=["both", "one"])
def test_weights_and_optimizer_state_are_those_of_the_real_thing(texts):
    settings = config(text_encoders=texts)
    trained = trained_parameters(real(texts))
    assert {name: tuple(p.shape) for name, p in trained.items()} == trained_shapes(settings, small_spec())
    optimizer = create_optimizer("adamw", trained.items(), seed=0, **settings.optimizer.model_dump(exclude={"name"}))
    for weight in trained.values():
        weight.data.zero_()
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    weights, state, average = state_parts(settings, small_spec())
    assert weights.bytes == average.bytes == sum(p.nbytes for p in trained.values())
    assert state.bytes == sum(t.nbytes for entry in optimizer.state.values() for t in entry.values())


def test_what_of_the_text_encoders_stays_is_counted_and_the_unet_is_whole():
    whole = {one: sum(map(prod, sdxl_spec().heard_shapes(one).values())) for one in TEXT_ENCODERS}
    assert num_frozen_text(config(), sdxl_spec()) == num_frozen_text(config(text_encoders=BOTH), sdxl_spec()) == 0
    assert num_frozen_text(config(text_encoders=ONE), sdxl_spec()) == whole["text_encoder_2"]
    lora = config(text_encoders=ONE, adapter={"kind": "lora"})
    assert num_frozen_text(lora, sdxl_spec()) == sum(whole.values())
    assert num_frozen(lora, sdxl_spec()) == sdxl_spec().num_parameters("unet")
    assert num_frozen(config(text_encoders=BOTH), sdxl_spec()) == 0
    parts = {part.name: part.bytes for part in resident_parts(lora, sdxl_spec())}
    assert parts["frozen text encoders"] == 2 * sum(whole.values())


def test_no_caption_is_encoded_before_the_steps_or_cached():
    phases = [phase.name for phase in plan_memory(config(text_encoders=BOTH), sdxl_spec(), StubTracer(sdxl_spec())).phases]
    assert "encoding captions" not in phases
    less = cache_bytes_per_picture(config(), sdxl_spec()) - cache_bytes_per_picture(config(text_encoders=BOTH), sdxl_spec())
    assert less == 2 * (77 * 2048 + 1280)


def test_the_export_has_them_in_its_own_number_format():
    more = export_bytes(config(text_encoders=BOTH, export={"dtype": "float32"}), sdxl_spec())
    texts = sum(sdxl_spec().num_parameters(one) for one in TEXT_ENCODERS)
    assert more - export_bytes(config(export={"dtype": "float32"}), sdxl_spec()) == 2 * texts


def test_a_pass_makes_their_gradients():
    assert trace_step(small_spec(), **SMALL, texts=TEXT_ENCODERS).peak > 4 * num_trained(config(text_encoders=BOTH), small_spec())


@pytest.mark.long
def test_a_pass_leaves_their_activations_too_and_fewer_if_they_are_computed_again():
    alone, both = trace_step(small_spec(), **SMALL), trace_step(small_spec(), **SMALL, texts=TEXT_ENCODERS)
    assert both.activations > alone.activations
    assert both.forward_flops > alone.forward_flops
    few, fewer = (trace_step(small_spec(), **SMALL | {"checkpointing": True}, texts=texts) for texts in ((), TEXT_ENCODERS))
    assert fewer.activations - few.activations < both.activations - alone.activations


def test_they_have_a_rate_of_their_own_and_groups_have_the_last_word():
    groups = [{"match": ["text_encoder.embeddings"], "learning_rate_factor": 0.0}, {"match": ["*.attn2"], "learning_rate_factor": 3.0}]
    settings = config(text_encoders={**BOTH, "learning_rate_factor": 0.2}, training={"groups": groups}, optimizer={"learning_rate": 1e-5})
    shapes = trainable_shapes(settings, small_spec())
    own = own_settings(settings, shapes)
    assert own["text_encoder.embeddings.token_embedding.weight"].is_frozen
    assert own["text_encoder.encoder.layers.0.mlp.fc1.weight"].factor == 0.2
    assert "conv_in.weight" not in own
    assert list(group_findings(settings, shapes)) == []
    lines = [line.split() for line in table(settings, shapes) if line.startswith("text_encoder ")]
    assert [line[3] for line in lines] == ["frozen", "2e-06"]
    plain = config(text_encoders=BOTH)
    parts = [line.partition("  ")[0] for line in table(plain, trainable_shapes(plain, small_spec()))]
    assert parts == ["part", "the UNet", *TEXT_ENCODERS]


def test_a_pattern_that_fits_nothing_is_found_there_too():
    settings = config(training={"groups": [{"match": ["text_encoder.encoder"], "learning_rate_factor": 0.5}]})
    (finding,) = group_findings(settings, trainable_shapes(settings, small_spec()))
    assert "fits no tensor of the UNet" in finding.message
    settings = config(text_encoders=ONE, training={"groups": [{"match": ["text_encoder.encoder.layers.1"], "learning_rate_factor": 0.5}]})
    (finding,) = group_findings(settings, trainable_shapes(settings, small_spec()))
    assert "or a trained text encoder" in finding.message


def test_leaving_them_as_they_are_is_offered_unless_a_group_is_about_them():
    knob = next(knob for knob in KNOBS if knob.name == "text encoders")
    settings = config(text_encoders={**BOTH, "learning_rate_factor": 0.2, "stop_after": "2 epochs"})
    (level,) = knob.levels(settings)
    changed = with_changes(settings, level.changes)
    assert changed.text_encoders == config().text_encoders
    assert list(find(RULES, changed)) == []
    assert knob.levels(config()) == ()
    assert knob.levels(config(text_encoders=BOTH, training={"groups": [{"match": ["text_encoder_2"], "learning_rate_factor": 0.5}]})) == ()
