"""Frozen layers in fewer bytes: what they are rounded to, and that they compute as a plain layer with that weight does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aquatint.models.adapters import attach, start
from aquatint.models.frozen import NF4, FrozenLinear, dequantise, freeze_compactly, halve, quantise, weight_shapes
from aquatint.models.frozen_shapes import compact_layers, largest_blocks, part_bytes, transformer_blocks
from aquatint.models.sdxl.load import open_base
from aquatint.models.sdxl.model import predict, sdxl_spec
from tests.models.sdxl.small import small_spec

from .test_adapters import SPECS, inputs, small_unet

FORMATS = ("own", "int8", "nf4")
EACH_FORMAT = pytest.mark.parametrize("kept", FORMATS)


def weight_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-4, 1, shape[0]).unsqueeze(1)


def compacted(kept, dtype=torch.float32):
    """A small UNet with compact layers, and a plain one with the weights that these stand for."""
    unet, plain = small_unet(dtype), small_unet(dtype)
    layers = compact_layers(weight_shapes(unet), kept)
    for name, take in freeze_compactly(unet, layers, kept, dtype).items():
        take(plain.get_parameter(name).detach())
    with torch.no_grad():
        for layer in layers:
            plain.get_submodule(layer).weight.copy_(unet.get_submodule(layer).weight)
    return unet, plain


def test_the_values_of_nf4_are_quantiles_of_the_normal_distribution():
    tail = 1 - 0.5 * (1 / 30 + 1 / 32)  # (arXiv 2305.14314, section 3, with the offset of its code)
    above, below = torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1], torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1]
    values = torch.cat([torch.special.ndtri(above), -torch.special.ndtri(below), torch.zeros(1)]).sort().values
    assert torch.allclose(values / values.max(), torch.tensor(NF4, dtype=torch.float64), atol=3e-4)


def test_8_bits_are_at_most_half_a_step_away_in_each_row():
    weight = weight_of(60, 48)
    weight[7] = 0
    error = (dequantise(quantise(weight, "int8", torch.float32), "int8", (60, 48), torch.float32) - weight).abs()
    assert (error <= weight.abs().amax(dim=1, keepdim=True) / 254 * (1 + 1e-5)).all()
    assert not error[7].any()


def test_4_bits_are_the_nearest_of_the_16_values_in_each_block():
    weight = weight_of(6, 128)
    weight[2, :64] = 0
    parts = quantise(weight, "nf4", torch.float32)
    blocks = weight.view(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    distances = (blocks.unsqueeze(-1) - scale.unsqueeze(-1) * torch.tensor(NF4)).abs()
    found = dequantise(parts, "nf4", (6, 128), torch.float32).view(-1, 64)
    assert torch.equal((found - blocks).abs(), distances.amin(dim=-1))
    assert (parts[0].dtype, parts[0].numel()) == (torch.uint8, 6 * 128 // 2)


@EACH_FORMAT
def test_what_is_rounded_twice_is_as_if_rounded_once(kept):
    parts = quantise(weight_of(60, 64), kept, torch.float32)
    again = quantise(dequantise(parts, kept, (60, 64), torch.float32), kept, torch.float32)
    assert torch.equal(parts[0], again[0])
    assert all(torch.allclose(one, other, rtol=1e-6) for one, other in zip(parts[1:], again[1:], strict=True))


@pytest.mark.parametrize("kept", ["int8", "nf4"])
def test_a_bf16_weight_is_the_float32_one_rounded_once(kept):
    parts = quantise(weight_of(60, 64), kept, torch.bfloat16)
    whole, half = (dequantise(parts, kept, (60, 64), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(half, whole.to(torch.bfloat16))


@EACH_FORMAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 64), (2, 64, 5)])
def test_a_layer_and_its_gradient_have_the_bits_of_a_plain_one(kept, dtype, shape):
    layer = nn.Linear(64, 48).to(dtype)
    frozen = FrozenLinear(layer, kept, dtype)
    frozen.take(layer.weight.detach())
    first, second = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_() for _ in range(2))
    one, other = (x.transpose(1, 2) if shape[-1] == 5 else x for x in (first, second))  # not contiguous
    expected, found = F.linear(one, frozen.weight, layer.bias), frozen(other)
    for output in (expected, found):
        output.float().square().sum().backward()
    assert torch.equal(expected, found)
    assert torch.equal(first.grad, second.grad)


@EACH_FORMAT
def test_nothing_is_kept_from_the_forward_to_the_backward_pass(kept):
    layer = nn.Linear(64, 64)
    frozen = FrozenLinear(layer, kept, torch.float32)
    frozen.take(layer.weight.detach())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        frozen(torch.randn(2, 64, requires_grad=True))
    assert saved == []


@pytest.mark.parametrize(("kept", "name", "autocast"), [("own", "dora", False), ("int8", "lora", True), ("nf4", "dora", True)])
def test_adapters_beside_compact_layers_learn_as_beside_plain_ones(kept, name, autocast):
    found = []
    for unet in compacted(kept, torch.bfloat16 if autocast else torch.float32):
        attach(unet, SPECS[name], torch.float32)
        start(unet, seed=5)
        with torch.no_grad():
            for trained in (p for p in unet.parameters() if p.requires_grad):
                trained.mul_(1.01).add_(0.01)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = predict(unet, *inputs())
        output.square().mean().backward()
        found.append((output, {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}))
    (output, gradients), (expected, others) = found
    assert torch.equal(output, expected)
    assert gradients.keys() == others.keys()
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


@EACH_FORMAT
def test_a_layer_takes_the_bytes_that_planning_counts(kept):
    for dtype in (torch.float32, torch.bfloat16):
        layer = FrozenLinear(nn.Linear(96, 64), kept, dtype)
        assert tuple(part.nbytes for part in layer.parts) == part_bytes((64, 96), kept, dtype.itemsize)
        assert [part.shape for part in layer.parts] == [part.shape for part in quantise(torch.ones(64, 96), kept, dtype)]


def test_most_of_sdxl_can_be_kept_in_few_bits_and_swapped():
    shapes = sdxl_spec().shapes("unet")
    for kept in FORMATS:
        layers = compact_layers(shapes, kept)
        assert len(layers) == 722
        assert sum(rows * columns for rows, columns in layers.values()) == 2_207_744_000
    blocks = transformer_blocks(layers)
    assert len(blocks) == 70
    assert all(len(members) == 10 for members in blocks.values())
    assert all(layers[member][0] in (1280, 10240) for members in largest_blocks(layers, 60).values() for member in members)
    assert list(largest_blocks(layers, 70)) != list(blocks), "the largest come first"


def test_a_weight_whose_blocks_are_not_full_stays_as_it_is():
    shapes = {"a.attentions.0.to_q.weight": (3, 64), "a.attentions.0.to_k.weight": (3, 32), "a.attentions.0.proj_in.weight": (64, 64, 1, 1)}
    assert list(compact_layers(shapes, "nf4")) == ["a.attentions.0.to_q"]
    assert list(compact_layers(shapes, "int8")) == ["a.attentions.0.to_q", "a.attentions.0.to_k"]


@EACH_FORMAT
def test_a_base_is_loaded_into_compact_layers_from_its_own_numbers(tiny_base, kept):
    base = open_base(tiny_base)
    layers = compact_layers(base.spec.shapes("unet"), kept)
    unet = base.load_unet(torch.bfloat16, lambda unet: freeze_compactly(unet, layers, kept, torch.bfloat16))
    plain = base.load_unet(torch.bfloat16).state_dict()
    component = base.component("unet")
    for layer in list(layers)[::20]:
        expected = quantise(component[f"{layer}.weight"].load(), kept, torch.bfloat16)
        assert all(torch.equal(part, other) for part, other in zip(unet.get_submodule(layer).parts, expected, strict=True))
    loaded = unet.state_dict()
    assert loaded.keys() == plain.keys() - {f"{layer}.weight" for layer in layers}
    assert all(torch.equal(loaded[name], plain[name]) for name in loaded)


def test_frozen_matrices_in_bf16_give_the_same_bits_under_autocast():
    found = []
    for is_half in (False, True):
        unet = small_unet().train()
        for name, p in unet.named_parameters():
            p.requires_grad_(name.startswith("up_blocks"))
        frozen = [name for name, p in unet.named_parameters() if not p.requires_grad and p.dim() > 1]
        if is_half:
            halve(unet, frozen)
            assert {unet.get_parameter(name).dtype for name in frozen} == {torch.bfloat16}
        with torch.autocast("cpu", torch.bfloat16):
            output = predict(unet, *inputs())
        output.square().mean().backward()
        found.append((output, {name: p.grad for name, p in unet.named_parameters() if p.requires_grad}))
    (output, gradients), (expected, others) = found
    assert torch.equal(output, expected)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


def test_the_small_model_has_all_of_it():
    assert len(transformer_blocks(compact_layers(small_spec().shapes("unet"), "nf4"))) > 2
