import contextlib
from dataclasses import asdict

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from aquatint.models.sdxl.model import build_unet, build_vae, decode_latents, predict, sdxl_spec
from aquatint.optim import flat
from aquatint.optim.clipping import Clipping
from aquatint.optim.create import create_optimizer
from aquatint.optim.fused import FusedBackward
from aquatint.planning import trace
from aquatint.planning.memory import update_bytes
from aquatint.planning.trace import Tally, trace_decode, trace_encode, trace_step, trace_unet, with_fake_weights

from .small import config, small_spec

GIB = 1 << 30
SMALL = {"dtype": torch.float32, "autocast": False, "checkpointing": False, "batch_size": 1, "size_hw": (128, 192)}


def test_what_is_made_and_dropped_is_counted():
    tally = Tally()
    with tally.counting():
        first = torch.ones(1000)
        second = first * 2
        assert tally.now == 8000
        view = second.view(10, 100)[3:5]
        del second
        assert tally.now == 8000
        del view
        assert tally.now == 4000
        third = first + 1
    assert (tally.now, tally.peak) == (8000, 8000)
    del third
    assert (tally.now, tally.peak) == (4000, 8000)


def test_known_tensors_are_not_counted():
    weight = torch.ones(1000)
    tally = Tally([weight])
    with tally.counting():
        output = weight.mul_(2)
        product = output.view(10, 100).sum()
    assert product == 2000
    assert tally.peak == 4


def test_the_backward_pass_of_one_layer_is_counted_in_closed_form():
    weight = torch.ones(64, 32, requires_grad=True)
    tally = Tally([weight])
    with tally.counting():
        inputs = torch.ones(16, 32)
        output = inputs @ weight.t()
        loss = output.square().sum()
        assert tally.now == 4 * (16 * 32 + 16 * 64 + 1)
        assert tally.peak == tally.now + 4 * 16 * 64  # the squares, until they are summed
        loss.backward()
        del output, loss
    assert weight.grad is not None
    assert tally.now == 4 * (16 * 32 + 64 * 32)
    assert inputs.shape == (16, 32)


@pytest.mark.parametrize("checkpointing", [False, "pointwise", True])
@pytest.mark.parametrize("autocast", [False, True])
def test_tensors_without_memory_give_the_bytes_of_real_ones(monkeypatch, checkpointing, autocast):
    settings = {**SMALL, "checkpointing": checkpointing, "autocast": autocast, "accumulating": True, "size_hw": (64, 96)}
    fake = trace_step(small_spec(), **settings)
    monkeypatch.setattr(trace, "_fake", contextlib.nullcontext)
    real = trace_step(small_spec(), **settings)
    assert {**asdict(fake), "peak": 0} == {**asdict(real), "peak": 0}
    assert fake.peak == pytest.approx(real.peak, rel=0.02)


@pytest.fixture(scope="module")
def plain():
    return trace_step(small_spec(), **SMALL)


def test_activations_grow_with_the_batch_and_the_area(plain):
    four = trace_step(small_spec(), **{**SMALL, "batch_size": 4})
    larger = trace_step(small_spec(), **{**SMALL, "size_hw": (256, 192)})
    assert four.activations == pytest.approx(4 * plain.activations, rel=0.01)
    assert 1.5 * plain.activations < larger.activations < 2.05 * plain.activations


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw8bit"])
def test_steps_inside_the_backward_pass_need_what_real_ones_do(monkeypatch, optimizer):
    monkeypatch.setattr(flat, "CPU_PIECE", 1 << 40)  # whole tensors, as on a GPU
    settings = config(training={"precision": "fp32"}, optimizer={"name": optimizer, "learning_rate": 0.0})
    traced = trace_step(small_spec(), **SMALL, fused_backward=True)
    torch.manual_seed(0)
    unet = with_fake_weights(build_unet(small_spec()), torch.float32).train()
    for weight in unet.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    real = create_optimizer(optimizer, unet.named_parameters(), seed=0, **settings.optimizer.model_dump(exclude={"name"}))
    for unit in real.units():
        for weight in unit.params:
            weight.grad = torch.zeros_like(weight)
        real.update(unit)
    real.zero_grad()
    fused = FusedBackward(real, Clipping("per_tensor", 1.0))
    tally = Tally([*unet.parameters(), *(t for entry in real.state.values() for t in entry.values())])
    with tally.counting():
        inputs = (torch.randn(1, 4, 16, 24), torch.zeros(1), torch.randn(1, 77, 40), torch.randn(1, 24), torch.zeros(1, 6))
        loss = predict(unet, *inputs).square().mean()
        fused.arm(torch.tensor(True))
        loss.backward()
        fused.finish()
    assert all(weight.grad is None for weight in unet.parameters())
    gradients = 4 * small_spec().num_parameters("unet")
    assert traced.peak_with(update_bytes(settings)) == pytest.approx(tally.peak, rel=0.05)
    assert traced.peak <= traced.peak_with(1) < trace_step(small_spec(), **SMALL).peak + gradients


def test_gradients_that_are_freed_never_exist_all_at_once():
    few = {**SMALL, "size_hw": (32, 32), "checkpointing": True}
    largest = 4 * max(weight.numel() for weight in build_unet(small_spec()).parameters())
    freed, kept = (trace_step(small_spec(), **few, fused_backward=value) for value in (True, False))
    assert kept.peak > 4 * small_spec().num_parameters("unet")
    assert freed.peak < freed.activations + 6 * largest < 0.5 * kept.peak


def test_checkpointing_keeps_less_and_accumulation_needs_more(plain):
    recomputed = trace_step(small_spec(), **{**SMALL, "checkpointing": True})
    accumulating = trace_step(small_spec(), **{**SMALL, "accumulating": True})
    assert recomputed.activations < 0.5 * plain.activations
    assert recomputed.peak < plain.peak < accumulating.peak


def test_gradients_freed_inside_the_backward_pass_need_no_room_of_their_own():
    settings = {**SMALL, "checkpointing": True, "size_hw": (64, 64)}
    kept, freed = (trace_step(small_spec(), **settings, fused_backward=fused) for fused in (False, True))
    assert (freed.activations, freed.flops) == (kept.activations, kept.flops)
    weights = 4 * small_spec().num_parameters("unet")
    assert kept.peak > weights > freed.peak


def test_longer_captions_need_a_little_more(plain):
    longer = trace_step(small_spec(), **SMALL, num_tokens=3 * 77)
    assert plain.activations < longer.activations < 1.2 * plain.activations


def test_work_without_gradients_is_counted():
    spec, settings = small_spec(), {"dtype": torch.float32, "size_hw": (128, 128)}
    encoded = [trace_encode(spec, batch_size=n, **settings) for n in (1, 4)]
    assert encoded[1].peak == pytest.approx(4 * encoded[0].peak, rel=0.05)
    assert encoded[1].flops == 4 * encoded[0].flops
    assert encoded[0].peak > 4 * 8 * 128 * 128  # one tensor of the first block
    assert trace_decode(spec, **settings).peak > encoded[0].peak
    assert 0 < trace_unet(spec, batch_size=1, **settings).peak < trace_step(spec, **{**SMALL, **settings}).activations


def test_denoising_needs_bytes_in_proportion_to_the_batch_and_to_those_of_a_number():
    one = trace_unet(small_spec(), dtype=torch.float32, batch_size=1, size_hw=(128, 192)).peak
    many = trace_unet(small_spec(), dtype=torch.bfloat16, batch_size=8, size_hw=(128, 192)).peak
    assert many == pytest.approx(8 * one / 2, rel=0.01)


def test_two_operations_for_each_multiply_add_of_a_layer_and_its_backward_pass():
    weight, inputs = torch.ones(64, 32, requires_grad=True), torch.ones(16, 32, requires_grad=True)
    tally = Tally()
    with tally.counting():
        output = (inputs @ weight.t()).relu()
        assert tally.flops == 2 * 16 * 32 * 64
        output.sum().backward()
    assert tally.flops == 3 * 2 * 16 * 32 * 64


def test_the_backward_pass_of_attention_is_twice_the_forward_pass():
    query, key, value = (torch.ones(2, 4, tokens, 8, requires_grad=True) for tokens in (24, 10, 10))
    tally = Tally()
    with tally.counting():
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        assert tally.flops == 2 * 2 * (2 * 4) * 24 * 10 * 8
        output.sum().backward()
    assert tally.flops == 3 * 2 * 2 * (2 * 4) * 24 * 10 * 8


def test_operations_are_those_of_pytorchs_own_counter(plain):
    unet, vae = build_unet(small_spec()), build_vae(small_spec())
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        inputs = (torch.empty(1, 4, 16, 24), torch.zeros(1), torch.empty(1, 77, 40), torch.empty(1, 24), torch.empty(1, 6))
        output = predict(unet, *inputs)
        forward = counter.get_total_flops()
        output.square().mean().backward()
        whole = counter.get_total_flops()
        decode_latents(vae, torch.empty(1, 4, 16, 24))
    assert (plain.forward_flops, plain.flops) == (forward, whole)
    decoded = trace_decode(small_spec(), dtype=torch.float32, size_hw=(128, 192))
    assert decoded.flops == counter.get_total_flops() - whole


@pytest.mark.parametrize(
    ("checkpointing", "gib", "tflop"),
    [(False, 6.41, 20.23), pytest.param("pointwise", 3.86, 20.23, marks=pytest.mark.long), (True, 0.55, 25.44)],
)
def test_the_full_size_unet_needs_what_was_measured(checkpointing, gib, tflop):
    settings = {**SMALL, "dtype": torch.bfloat16, "size_hw": (1024, 1024), "checkpointing": checkpointing}
    cost = trace_step(sdxl_spec(), **settings)
    assert cost.activations / GIB == pytest.approx(gib, abs=0.01)
    assert (cost.forward_flops / 1e12, cost.flops / 1e12) == pytest.approx((6.761, tflop), rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("autocast", [False, True])
def test_kernels_leave_less_for_the_backward_pass_and_compute_nothing_twice(autocast):
    settings = {**SMALL, "dtype": torch.bfloat16, "autocast": autocast}
    one, other = (trace_step(small_spec(), **settings, kernels=kernels) for kernels in (False, True))
    assert other.flops == one.flops
    assert other.activations < 0.85 * one.activations
    checkpointed = [trace_step(small_spec(), **{**settings, "checkpointing": True}, kernels=kernels) for kernels in (False, True)]
    assert checkpointed[1].flops == checkpointed[0].flops


def test_the_full_size_autoencoder_computes_what_was_measured():
    settings = {"dtype": torch.float32, "size_hw": (1024, 1024)}
    flops = trace_encode(sdxl_spec(), batch_size=1, **settings).flops, trace_decode(sdxl_spec(), **settings).flops
    assert [value / 1e12 for value in flops] == pytest.approx([4.879, 10.470], rel=1e-3)
