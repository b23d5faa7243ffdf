"""A UNet that is computed in another way computes the same, under the same names, whatever hangs on its layers."""

from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch.overrides import TorchFunctionMode

from aquatint.demo.model import random_tensors
from aquatint.models.adapter_shapes import AdapterSpec
from aquatint.models.adapters import attach, start
from aquatint.models.recompute import recompute
from aquatint.models.sdxl.model import build_unet, predict
from aquatint.models.sdxl.speed import compile_blocks, leave_out_idle, use_channels_last, use_fused_qkv, use_kernels
from aquatint.tensor_file import write_tensors
from tests.models.sdxl.small import small_spec

WAYS = {
    "channels_last": (use_channels_last,),
    "kernels": (use_channels_last, use_kernels),
    "kernels beside checkpointing": (use_channels_last, partial(use_kernels, lean=False)),
    "fused_qkv": (use_fused_qkv,),
    "all": (use_channels_last, use_kernels, use_fused_qkv),
}
ADAPTERS = {"lora": AdapterSpec("lora", 4, 8.0, "all"), "dora": AdapterSpec("dora", 4, 8.0, "all")}
# torch's own code warns while it compiles a function with a backward pass of its own
COMPILING = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad attribute:UserWarning")


@cache
def template():
    """Two channels to a group at least: with one, the shift before a norm would have no gradient."""
    small = small_spec()
    spec = replace(small, unet={**small.unet, "norm_num_groups": 4})
    unet = build_unet(spec)
    unet.load_state_dict({name: lazy.load() for name, lazy in random_tensors("unet", spec, 3).items()}, assign=True)
    return unet


def unet_of(dtype=torch.float32, adapter=None):
    unet = torch.nn.Module.to(deepcopy(template()), dtype).train()
    if adapter is None:
        return unet.requires_grad_(True)
    attach(unet, ADAPTERS[adapter], torch.float32)
    start(unet, seed=5)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(".lora.up"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(7))
    return unet


def changed(unet, way):
    for use in WAYS[way]:
        use(unet)
    return unet


def results(unet, *, autocast=False):
    """The prediction, and all gradients as one vector."""
    bits = torch.Generator().manual_seed(1)
    latents, embeds, pooled = (torch.randn(*shape, generator=bits) for shape in ((2, 4, 8, 12), (2, 7, 80), (2, 48)))
    time_ids = torch.tensor([[64.0, 96, 0, 0, 64, 96]] * 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = predict(unet, latents.bfloat16(), torch.tensor([10, 700]), embeds.bfloat16(), pooled.bfloat16(), time_ids)
    output.square().mean().backward()
    return output.detach(), torch.cat([p.grad.flatten().double() for p in unet.parameters() if p.grad is not None])


def errors(expected, found):
    return [float((one - other).norm() / one.norm()) for one, other in zip(expected, found, strict=True)]


@cache
def exact():
    return results(unet_of(torch.float64))


@cache
def plain(dtype=torch.float32, autocast=False):
    return results(unet_of(dtype), autocast=autocast)


@pytest.mark.parametrize("way", WAYS)
def test_prediction_and_gradients_are_those_of_the_plain_one_and_names_stay(way):
    unet = changed(unet_of(), way)
    assert max(errors(plain(), results(unet))) < 1e-5
    assert list(unet.state_dict()) == list(template().state_dict())
    assert list(dict(unet.named_modules())) == list(dict(template().named_modules()))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_in_bf16_it_is_no_further_from_the_truth_than_the_plain_one(way, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    found = errors(exact(), results(changed(unet_of(dtype), way), autocast=autocast))
    for of_ours, of_plain in zip(found, errors(exact(), plain(dtype, autocast)), strict=True):
        assert of_ours < 1.1 * of_plain


@pytest.mark.parametrize("what", ["bf16", "autocast", "channels_last", "lora", "pointwise"])
def test_without_what_is_idle_every_bit_is_the_same(what):
    dtype, adapter, autocast = (
        (torch.bfloat16 if what == "bf16" else torch.float32),
        ("lora" if what == "lora" else None),
        what == "autocast",
    )
    expected, found = unet_of(dtype, adapter), unet_of(dtype, adapter)
    leave_out_idle(found)
    for unet in (expected, found):
        if what == "channels_last":
            use_channels_last(unet)
        recompute(unet, "pointwise" if what == "pointwise" else False)
    assert all(map(torch.equal, results(expected, autocast=autocast), results(found, autocast=autocast)))
    assert list(dict(found.named_modules())) == list(dict(expected.named_modules()))


class Divisions(TorchFunctionMode):
    """Counts divisions."""

    found = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.found += func.__name__ in ("div", "__truediv__")
        return func(*args, **(kwargs or {}))


def test_what_is_idle_is_one_division_for_each_residual_block_and_each_attention():
    unet = unet_of()
    with Divisions() as before:
        expected = results(unet)
    unet.zero_grad()
    leave_out_idle(unet)
    with Divisions() as after:
        assert all(map(torch.equal, expected, results(unet)))
    assert before.found - after.found == sum(isinstance(module, ResnetBlock2D | Attention) for module in unet.modules())


def test_what_is_not_idle_or_changed_already_stays():
    others = (
        ResnetBlock2D(in_channels=32, output_scale_factor=2.0),
        Attention(8, rescale_output_factor=2.0),
        Attention(8, residual_connection=True),
    )
    modules = torch.nn.ModuleList([*others, changed(unet_of(), "all")])
    before = [type(module) for module in modules.modules()]
    leave_out_idle(modules)
    assert [type(module) for module in modules.modules()] == before


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_hang_on_as_before(adapter):
    expected, found = results(unet_of(adapter=adapter)), results(changed(unet_of(adapter=adapter), "kernels"))
    assert max(errors(expected, found)) < 1e-5


@pytest.mark.parametrize("what", [True, "pointwise"])
def test_what_is_computed_again_is_the_same_to_the_bit(what):
    straight, again = changed(unet_of(), "all"), changed(unet_of(), "all")
    recompute(again, what)
    assert all(map(torch.equal, results(straight), results(again)))


def test_trained_weights_and_their_gradients_stay_as_they_are_in_memory_and_frozen_ones_are_turned(tmp_path):
    unet = unet_of()
    unet.down_blocks[0].requires_grad_(False)
    before = write_tensors(tmp_path / "before.safetensors", unet.state_dict())
    use_channels_last(unet)
    for name, parameter in unet.named_parameters():
        is_turned = name.startswith("down_blocks.0") and parameter.dim() == 4 and parameter.shape[2] > 1
        assert parameter.is_contiguous() != is_turned
    assert write_tensors(tmp_path / "after.safetensors", unet.state_dict()) == before
    results(unet)
    assert all(parameter.grad.is_contiguous() for parameter in unet.parameters() if parameter.requires_grad)


def test_pictures_keep_their_channels_last_from_end_to_end():
    unet, seen = changed(unet_of(), "kernels"), []
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d | ResnetBlock2D):
            module.register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0], output)))
    results(unet)
    assert len(seen) > 100
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen)


def test_what_is_not_of_sdxl_is_refused():
    with pytest.raises(ValueError, match="residual block"):
        use_kernels(torch.nn.ModuleList([ResnetBlock2D(in_channels=32, up=True)]))
    with pytest.raises(ValueError, match="feed-forward"):
        use_kernels(torch.nn.ModuleList([BasicTransformerBlock(8, 1, 8, activation_fn="gelu")]))
    with pytest.raises(ValueError, match="cannot be joined"):
        use_fused_qkv(unet_of(adapter="lora"))


class Pair(torch.nn.Module):
    """One block of each kind, one after the other."""

    def __init__(self, unet):
        super().__init__()
        self.resnet, self.transformer = unet.down_blocks[0].resnets[0], unet.mid_block.attentions[0].transformer_blocks[0]

    def forward(self, pictures, embedding, captions):
        rows = self.resnet(pictures, embedding).flatten(2).transpose(1, 2)
        return self.transformer(rows.repeat(1, 1, 2), encoder_hidden_states=captions)


def pair_results(pair, side=6):
    bits = torch.Generator().manual_seed(2)
    pair.zero_grad()
    output = pair(*(torch.randn(*shape, generator=bits) for shape in ((2, 8, side, side), (2, 32), (2, 7, 80))))
    output.square().mean().backward()
    return output.detach(), torch.cat([p.grad.flatten().double() for p in pair.parameters() if p.grad is not None])


@COMPILING
def test_a_compiled_block_computes_the_same():
    torch._dynamo.reset()
    block = changed(unet_of(), "kernels").down_blocks[0].resnets[0]
    put = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(2)), torch.ones(2, 32)
    expected = block(*put)
    compile_blocks(torch.nn.ModuleList([block]), num_shapes=2, backend="eager")
    assert torch.equal(block(*put), expected)
    assert torch._dynamo.config.recompile_limit >= 2


@COMPILING
@pytest.mark.long
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_compiled_blocks_compute_the_same_and_are_compiled_once_for_a_shape(adapter):
    torch._dynamo.reset()
    way = "all" if adapter is None else "kernels"
    expected, found = (Pair(changed(unet_of(adapter=adapter), way)) for _ in range(2))
    names = list(found.state_dict())
    compile_blocks(found, num_shapes=2, backend="eager")
    assert list(found.state_dict()) == names
    torch._dynamo.utils.counters.clear()
    for side in (6, 5, 6):
        assert max(errors(pair_results(expected, side), pair_results(found, side))) < 1e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


@COMPILING
@pytest.mark.long
def test_compiled_blocks_are_computed_again_and_looked_at_without_gradients():
    torch._dynamo.reset()
    unet = changed(unet_of(), "all")
    expected = results(unet)
    recompute(unet, True)
    compile_blocks(unet, num_shapes=1, backend="eager")
    unet.zero_grad()
    with torch.no_grad():
        predict(unet, *(torch.zeros(shape) for shape in ((1, 4, 8, 8), (1,), (1, 7, 80), (1, 48), (1, 6))))
    assert max(errors(expected, results(unet))) < 1e-6


@pytest.mark.filterwarnings("ignore")  # inductor loads much of torch that warns
@pytest.mark.slow
@pytest.mark.parametrize("way", ["channels_last", "all"])
def test_compiled_for_good_they_do_too_and_compiled_again_to_the_same_bits(way):
    expected = pair_results(Pair(changed(unet_of(), way)))
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        pair = Pair(changed(unet_of(), way))
        compile_blocks(pair, num_shapes=1)
        found.append(pair_results(pair))
    assert max(errors(expected, found[0])) < 1e-5
    assert all(map(torch.equal, *found))
