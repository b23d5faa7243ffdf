"""What groups make of the tensors of a model: what is frozen is counted as such, what fits nothing is said, and the table adds up."""

from math import prod
from pathlib import Path

import pytest
import torch

from aquatint.errors import UsageError
from aquatint.models.adapter_shapes import NAME, adapter_shapes
from aquatint.models.frozen import halve
from aquatint.models.sdxl.model import build_unet, sdxl_spec
from aquatint.optim.create import create_optimizer
from aquatint.optim.groups import GroupSettings
from aquatint.planning.disk import checkpoint_bytes, export_bytes
from aquatint.planning.groups import block_of, frozen_names, group_findings, own_settings, table
from aquatint.planning.kept import half_frozen
from aquatint.planning.memory import plan_memory, state_parts
from aquatint.planning.report import plan_text
from aquatint.planning.trace import trace_step
from aquatint.planning.trained import adapter_spec, check_groups, num_frozen, num_trained, trainable_shapes, trained_shapes
from aquatint.training.parallelize import ready_for_training, trained_parameters

from .small import StubTracer, config, small_spec

LORA = {"kind": "lora", "rank": 4}
HALF = [{"match": ["down_blocks", "*.attn2"], "learning_rate_factor": 0.0}]


def grouped(*groups, **sections):
    training = {**sections.pop("training", {}), "groups": [dict(group) for group in groups]}
    return config(training=training, **sections)


def test_the_first_group_decides_and_the_rest_is_trained_as_usual():
    settings = grouped(
        {"match": ["mid_block.resnets"], "weight_decay": 0.5}, {"match": ["mid_block", "conv_in"], "learning_rate_factor": 0.1}
    )
    names = ["conv_in.bias", "mid_block.resnets.0.conv1.weight", "mid_block.attentions.0.norm.weight", "conv_out.weight"]
    slow = GroupSettings(0.1, 0.01)
    assert own_settings(settings, names) == {names[0]: slow, names[1]: GroupSettings(1.0, 0.5), names[2]: slow}
    assert own_settings(config(), names) == {}


def test_a_part_of_an_adapter_goes_by_the_weight_beside_it():
    settings = grouped({"match": ["*.attn2.*.weight"], "learning_rate_factor": 0.5}, adapter=LORA)
    own = own_settings(settings, trainable_shapes(settings, small_spec()))
    assert own
    assert {name.rpartition(f".{NAME}.")[2] for name in own} == {"down", "up"}
    assert all(".attn2." in name for name in own)
    assert list(group_findings(settings, trainable_shapes(settings, small_spec()))) == []


@pytest.mark.parametrize(
    ("groups", "words", "hint"),
    [
        ([{"match": ["down_block.0"]}], '"down_block.0" fits no tensor of the UNet', 'did you mean "down_blocks.0"'),
        ([{"match": ["*.attn3.*"]}], '"*.attn3.*" fits no tensor', '"*.attn2"'),
        ([{"match": ["attn2"]}], '"attn2" fits no tensor', 'did you mean "*.attn2"'),
        ([{"match": ["zzzz"]}], '"zzzz" fits no tensor', "docs/groups.md lists the names"),
        (
            [{"match": ["*.to_q"]}, {"match": ["*.attn2.to_q"]}],
            "earlier groups have all that `training.groups.1` fits",
            "put it before them",
        ),
        ([{"match": ["*"], "learning_rate_factor": 0.0}], "`training.groups` freezes everything", "nothing would be trained"),
    ],
)
def test_what_fits_nothing_is_said_with_what_was_meant(groups, words, hint):
    (finding,) = group_findings(grouped(*groups), small_spec().shapes("unet"))
    assert words in finding.message
    assert hint in finding.hint
    with pytest.raises(UsageError, match=r"training\.groups"):
        check_groups(grouped(*groups), small_spec())


def test_layers_that_a_group_freezes_have_no_adapter():
    settings = grouped({"match": ["*.attn2"], "learning_rate_factor": 0}, adapter=LORA)
    assert list(group_findings(settings, trainable_shapes(settings, small_spec()))) == []
    everything = trained_shapes(config(adapter=LORA), small_spec())
    assert trained_shapes(settings, small_spec()) == {name: shape for name, shape in everything.items() if ".attn2." not in name}
    assert adapter_shapes(small_spec().shapes("unet"), adapter_spec(settings)) == trained_shapes(settings, small_spec())
    assert adapter_spec(grouped({"match": ["*.attn2"], "learning_rate_factor": 0.5}, adapter=LORA)) == adapter_spec(config(adapter=LORA))


def test_norms_have_no_adapter_to_be_grouped():
    settings = grouped({"match": ["*.norm1"]}, adapter=LORA)
    (finding,) = group_findings(settings, trainable_shapes(settings, small_spec()))
    assert finding.message == '"*.norm1" fits no tensor of the layers that have an adapter'


def test_every_block_of_the_guide_is_one():
    blocks = {block_of(name) for name in sdxl_spec().shapes("unet")}
    assert blocks == {
        "conv_in", "time_embedding", "add_embedding", "down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0",
        "up_blocks.1", "up_blocks.2", "conv_norm_out", "conv_out",
    }  # fmt: skip
    guide = (Path(__file__).parents[2] / "docs" / "groups.md").read_text(encoding="utf-8")
    assert all(f"`{block}`" in guide for block in blocks)


def test_what_is_frozen_and_what_is_trained_is_the_whole_unet():
    settings, shapes = grouped(*HALF), small_spec().shapes("unet")
    frozen = frozen_names(settings, shapes)
    assert frozen == {name for name in shapes if name.startswith("down_blocks.") or ".attn2." in name}
    assert trained_shapes(settings, small_spec()).keys() == shapes.keys() - frozen
    assert num_frozen(settings, small_spec()) == sum(prod(shapes[name]) for name in frozen)
    assert num_frozen(settings, small_spec()) + num_trained(settings, small_spec()) == small_spec().num_parameters("unet")
    assert num_frozen(config(adapter=LORA), small_spec()) == small_spec().num_parameters("unet")


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_weights_and_optimizer_state_are_those_of_the_real_thing(optimizer):
    settings = grouped(*HALF, {"match": ["up_blocks.0"], "learning_rate_factor": 0.5}, optimizer={"name": optimizer})
    shapes = small_spec().shapes("unet")
    unet = ready_for_training(
        build_unet(small_spec()).to_empty(device="cpu"), gradient_checkpointing=False, device=torch.device("cpu"),
        frozen=frozen_names(settings, shapes),
    )  # fmt: skip
    trained = trained_parameters(unet)
    assert {name: tuple(p.shape) for name, p in trained.items()} == trained_shapes(settings, small_spec())
    own = own_settings(settings, shapes)
    real = create_optimizer(optimizer, trained.items(), seed=0, own=own, **settings.optimizer.model_dump(exclude={"name"}))
    for weight in trained.values():
        weight.data.zero_()
        weight.grad = torch.zeros_like(weight)
    real.step()
    weights, state, average = state_parts(settings, small_spec())
    assert weights.bytes == sum(p.nbytes for p in trained.values())
    assert state.bytes == sum(t.nbytes for entry in real.state.values() for t in entry.values())
    assert average.bytes == 4 * num_trained(settings, small_spec())
    halve(unet, half_frozen(settings, small_spec()))
    parts = {part.name: part.bytes for part in plan_memory(settings, small_spec(), StubTracer(small_spec())).phases[2].parts}
    assert parts["frozen weights"] == sum(p.nbytes for p in unet.parameters()) - weights.bytes


def test_a_checkpoint_is_smaller_and_an_export_is_not():
    assert checkpoint_bytes(grouped(*HALF), sdxl_spec()) < 0.6 * checkpoint_bytes(config(), sdxl_spec())
    assert export_bytes(grouped(*HALF), sdxl_spec()) == export_bytes(config(), sdxl_spec())


def test_what_is_frozen_needs_no_gradient_and_less_arithmetic():
    small = {"dtype": torch.float32, "autocast": False, "checkpointing": True, "batch_size": 1, "size_hw": (64, 64)}
    frozen = frozen_names(grouped(*HALF), small_spec().shapes("unet"))
    whole, part = trace_step(small_spec(), **small), trace_step(small_spec(), **small, frozen=frozen)
    assert part.peak < whole.peak - 2 * num_frozen(grouped(*HALF), small_spec())
    assert part.forward_flops == whole.forward_flops
    assert part.flops < 0.95 * whole.flops


def test_the_table_has_a_row_for_each_block_and_group_and_adds_up():
    shapes = small_spec().shapes("unet")
    rows = [line.split() for line in table(grouped(*HALF, {"match": ["conv_out"], "weight_decay": 0.5}), shapes)[1:]]
    assert sum(int(row[1].replace(",", "")) for row in rows) == len(shapes)
    assert sum(int(row[2].replace(",", "")) for row in rows) == small_spec().num_parameters("unet")
    found = {(row[0], row[3]): row[4:] for row in rows}
    assert found["down_blocks.0", "frozen"] == ["down_blocks", "*.attn2"]
    assert found["mid_block", "frozen"] == ["down_blocks", "*.attn2"]
    assert found["mid_block", "1e-05"] == ["0.01"]
    assert found["conv_out", "1e-05"] == ["0.5", "conv_out"]
    assert ("down_blocks.0", "1e-05") not in found


def test_without_groups_one_row_says_it_all():
    shapes = sdxl_spec().shapes("unet")
    assert table(config(), shapes)[1:] == ["everything     1,680   2,567,463,684           1e-05           0.01"]


def test_the_plan_shows_the_table_and_refuses_groups_that_fit_nothing(monkeypatch):
    from aquatint.planning import report

    monkeypatch.setattr(report, "sdxl_spec", small_spec)
    sizes = {"buckets": {"resolution": 256, "min_side": 128}, "data": {"sources": [{"path": "s3://bucket/pictures"}]}}
    text = plan_text(grouped(*HALF, **sizes))
    assert "\n\nWhat is trained\n  part " in text
    assert "frozen weights" in text
    with pytest.raises(UsageError, match="fits no tensor"):
        plan_text(grouped({"match": ["nowhere"]}, **sizes))
