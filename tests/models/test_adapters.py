"""Adapters beside a frozen UNet: what they compute, what they leave alone, and what they are merged to."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import nn

from aquatint.demo.model import random_tensors
from aquatint.models.adapter_export import write_adapter
from aquatint.models.adapter_files import check_adapter, start_values
from aquatint.models.adapter_shapes import AdapterSpec, adapter_shapes, spec_layers, target_layers
from aquatint.models.adapters import Frozen, adapted_layers, attach, merged, row_norms, start, without_adapters
from aquatint.models.sdxl.model import build_unet, predict, sdxl_spec
from tests.models.sdxl.small import small_spec

SPECS = {
    "lora": AdapterSpec("lora", 4, 8.0, "transformer"),
    "rslora": AdapterSpec("lora", 4, 3.0, "all", rslora=True),
    "dora": AdapterSpec("dora", 3, 3.0, "all"),
}


@cache
def template():
    unet = build_unet(small_spec())
    weights = {name: lazy.load() for name, lazy in random_tensors("unet", small_spec(), 3).items()}
    unet.load_state_dict(weights, assign=True)
    return unet


def small_unet(dtype=torch.float32):
    return deepcopy(template()).to(dtype).eval()


def adapted(spec, dtype=torch.float32, base_dtype=torch.float32, *, moved=True):
    """A small UNet with adapters that have learned something."""
    unet = attach(small_unet(base_dtype), spec, dtype)
    start(unet, seed=5)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if moved and p.requires_grad and not name.endswith("down"):
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return unet


def inputs(batch=2):
    generator = torch.Generator().manual_seed(1)
    spec = small_spec()
    return (
        torch.randn(batch, 4, 8, 12, generator=generator),
        torch.tensor([10, 700][:batch]),
        torch.randn(batch, 7, spec.unet["cross_attention_dim"], generator=generator),
        torch.randn(batch, spec.text_encoder_2["projection_dim"], generator=generator),
        torch.tensor([[64.0, 96, 0, 0, 64, 96]] * batch),
    )


def one_layer(layer):
    """A network of this one layer, under a name that adapters go to."""
    return nn.ModuleDict({"block": nn.ModuleDict({"attentions": nn.ModuleList([nn.ModuleDict({"to_q": layer})])})})


def trained(unet):
    return {name: p for name, p in unet.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("targets", "layers"), [("attention", 560), ("transformer", 722), ("all", 788)])
def test_the_layers_of_sdxl_are_as_many_as_in_other_trainers(targets, layers):
    found = target_layers(sdxl_spec().shapes("unet"), targets)
    assert len(found) == layers
    kinds = {4: "convolution", 2: "linear"}
    assert {kinds[len(shape)] for shape in found.values()} == ({"linear", "convolution"} if targets == "all" else {"linear"})
    assert not any(name.startswith(("conv_", "time_embedding", "add_embedding")) for name in found)


def test_scales_are_those_of_the_papers_and_of_files():
    assert AdapterSpec("lora", 16, 8.0, "attention").scale == 0.5
    assert AdapterSpec("lora", 16, 8.0, "attention", rslora=True).scale == 2.0
    for spec in SPECS.values():
        assert spec.file_alpha / spec.rank == pytest.approx(spec.scale)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_names_and_shapes_are_those_that_planning_counts(spec):
    unet = attach(small_unet(), spec, torch.float32)
    assert {name: tuple(p.shape) for name, p in trained(unet).items()} == adapter_shapes(small_spec().shapes("unet"), spec)


def test_the_frozen_weights_keep_their_names_and_bits():
    before = {name: tensor.clone() for name, tensor in small_unet().state_dict().items()}
    after = adapted(SPECS["dora"]).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name.split(".lora.")[1] for name in after.keys() - before.keys()} == {"down", "up", "magnitude"}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_new_adapter_changes_nothing_at_all(spec):
    plain, new = predict(small_unet(), *inputs()), predict(adapted(spec, moved=False), *inputs())
    assert torch.equal(plain, new)


def test_first_values_depend_on_the_seed_and_the_name_alone():
    few, many = (attach(small_unet(), AdapterSpec("lora", 4, 4.0, targets), torch.float32) for targets in ("attention", "all"))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    start(few, 5)
    start(many, 5)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, trained(many)[name]) for name, p in trained(few).items())
    other = attach(small_unet(), AdapterSpec("lora", 4, 4.0, "attention"), torch.float32)
    start(other, 6)
    name = next(name for name in trained(few) if name.endswith("down"))
    assert not torch.equal(trained(few)[name], trained(other)[name])


def test_down_begins_like_a_linear_layer_and_up_at_zero():
    net = one_layer(nn.Linear(400, 10))
    attach(net, AdapterSpec("lora", 64, 64.0, "transformer"), torch.float32)
    start(net, 0)
    values = dict(net.named_parameters())
    down = values["block.attentions.0.to_q.lora.down"]
    assert down.abs().max() <= 1 / 20
    assert down.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    assert not values["block.attentions.0.to_q.lora.up"].any()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_merged_unet_answers_like_the_base_with_its_adapter(spec):
    unet, plain = adapted(spec), small_unet()
    expected, base = predict(unet, *inputs()), predict(plain, *inputs())
    weights = merged(dict(plain.named_parameters()), trained(unet), spec)
    plain.load_state_dict({name: value.load() if hasattr(value, "load") else value for name, value in weights.items()})
    found = predict(plain, *inputs())
    assert (expected - base).abs().max() > 1e-2
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_merge_is_the_formula():
    unet, spec = adapted(SPECS["lora"]), SPECS["lora"]
    name = next(iter(adapted_layers(unet)))
    parts = trained(unet)
    weight = unet.get_submodule(name).weight
    found = merged(dict(unet.named_parameters()), parts, spec, strength=0.25)[f"{name}.weight"].load()
    expected = weight + 0.25 * (8.0 / 4) * parts[f"{name}.lora.up"] @ parts[f"{name}.lora.down"]
    assert torch.allclose(found, expected, atol=1e-7)


@pytest.mark.parametrize("shape", [(12, 20), (12, 5, 3, 3)])
def test_norms_of_rows_are_those_of_the_whole_matrix(shape):
    generator = torch.Generator().manual_seed(0)
    weight, down = torch.randn(shape, generator=generator), torch.randn(4, *shape[1:], generator=generator)
    up = torch.randn(12, 4, *(1 for _ in shape[2:]), generator=generator)
    whole = weight.flatten(1) + 0.7 * up.flatten(1) @ down.flatten(1)
    assert torch.allclose(row_norms(weight, down, up, 0.7), whole.norm(dim=1), rtol=1e-5)


def test_dora_turns_rows_and_gives_each_its_magnitude():
    """arXiv 2402.09353, equation 5: m (W + dW) / ||W + dW||, by row."""
    spec = SPECS["dora"]
    unet = adapted(spec)
    name, parts = next(iter(adapted_layers(unet))), trained(unet)
    down, up, magnitude = (parts[f"{name}.lora.{part}"].flatten(1 if part != "magnitude" else 0) for part in ("down", "up", "magnitude"))
    weight = unet.get_submodule(name).weight
    turned = weight.flatten(1) + spec.scale * up @ down
    expected = magnitude[:, None] * turned / turned.norm(dim=1, keepdim=True)
    found = merged(dict(unet.named_parameters()), parts, spec)[f"{name}.weight"].load()
    assert torch.allclose(found.flatten(1), expected, atol=1e-6)
    assert torch.allclose(found.flatten(1).norm(dim=1), magnitude.abs(), rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_only_adapters_get_gradients_also_when_activations_are_computed_again(spec):
    gradients = []
    for checkpointing in (False, True):
        unet = adapted(spec).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        predict(unet, *inputs()).square().mean().backward()
        assert {name for name, p in unet.named_parameters() if p.grad is not None} == set(trained(unet))
        gradients.append({name: p.grad for name, p in trained(unet).items()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


def test_gradients_of_dora_are_those_of_its_formula_with_the_norm_as_a_constant():
    spec = AdapterSpec("dora", 3, 3.0, "transformer")
    net = one_layer(nn.Linear(8, 6)).double()
    attach(net, spec, torch.float64)
    start(net, 0)
    layer = net.get_submodule("block.attentions.0.to_q")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.lora.up.copy_(torch.randn(6, 3, generator=generator))
    x = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(layer(x).pow(3).sum(), [layer.lora.down, layer.lora.up, layer.lora.magnitude])
    turned = layer.weight + layer.lora.up @ layer.lora.down
    weight = layer.lora.magnitude[:, None] * turned / turned.norm(dim=1, keepdim=True).detach()
    expected = torch.autograd.grad((x @ weight.t() + layer.bias).pow(3).sum(), [layer.lora.down, layer.lora.up, layer.lora.magnitude])
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_float32_adapters_train_beside_bf16_weights(spec):
    unet = adapted(spec, torch.float32, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = predict(unet, *inputs())
    found.square().mean().backward()
    assert {p.grad.dtype for p in trained(unet).values()} == {torch.float32}
    expected = predict(adapted(spec), *inputs())
    assert torch.allclose(found, expected, atol=0.05 * expected.abs().max().item())


def test_adapters_can_be_bf16_like_the_base():
    unet = adapted(SPECS["lora"], torch.bfloat16, torch.bfloat16)
    predict(unet, *inputs()).square().mean().backward()
    assert {p.grad.dtype for p in trained(unet).values()} == {torch.bfloat16}


def test_without_adapters_it_is_the_base_and_then_itself_again():
    unet, plain = adapted(SPECS["lora"]), small_unet()
    before = predict(unet, *inputs())
    with without_adapters(unet):
        assert torch.equal(predict(unet, *inputs()), predict(plain, *inputs()))
    assert torch.equal(predict(unet, *inputs()), before)
    with torch.no_grad():
        assert torch.equal(predict(Frozen(unet), *inputs()), predict(plain, *inputs()))
        assert not torch.equal(before, predict(plain, *inputs()))


def test_what_groups_leave_out_has_no_adapter_and_is_in_no_file(tmp_path):
    spec = AdapterSpec("lora", 4, 4.0, "all", groups=(("mid_block.resnets", False), ("mid_block", True), ("*.attn2", True)))
    shapes = small_spec().shapes("unet")
    everywhere = target_layers(shapes, "all")
    left = spec_layers(shapes, spec)
    assert {name for name in everywhere if name not in left} == {
        name for name in everywhere if ".attn2." in name or name.startswith("mid_block.attentions")
    }
    unet = attach(small_unet(), spec, torch.float32)
    assert adapted_layers(unet).keys() == left.keys()
    assert {name: tuple(p.shape) for name, p in trained(unet).items()} == adapter_shapes(shapes, spec)
    start(unet, seed=5)
    path = tmp_path / "lora.safetensors"
    write_adapter(path, trained(unet), spec, shapes, names="kohya", dtype=torch.float32, metadata={})
    check_adapter(path, shapes, spec)
    assert start_values(path, shapes, spec).keys() == trained(unet).keys()
    base = dict(small_unet().named_parameters())
    both = merged(base, trained(unet), spec)
    assert [name for name in both if both[name] is not base[name]] == [name for name in base if name.removesuffix(".weight") in left]
