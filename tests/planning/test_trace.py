import contextlib

import pytest
import torch

from aquatint.models.sdxl.model import sdxl_spec
from aquatint.planning import trace
from aquatint.planning.trace import LiveBytes, trace_decode, trace_encode, trace_step, trace_unet

from .small import small_spec

GIB = 1 << 30
SMALL = {"dtype": torch.float32, "autocast": False, "checkpointing": False, "batch_size": 1, "size_hw": (128, 192)}


def test_what_is_made_and_dropped_is_counted():
    live = LiveBytes()
    with live.counting():
        first = torch.ones(1000)
        second = first * 2
        assert live.now == 8000
        view = second.view(10, 100)[3:5]
        del second
        assert live.now == 8000
        del view
        assert live.now == 4000
        third = first + 1
    assert (live.now, live.peak) == (8000, 8000)
    del third
    assert (live.now, live.peak) == (4000, 8000)


def test_known_tensors_are_not_counted():
    weight = torch.ones(1000)
    live = LiveBytes([weight])
    with live.counting():
        output = weight.mul_(2)
        product = output.view(10, 100).sum()
    assert product == 2000
    assert live.peak == 4


def test_the_backward_pass_of_one_layer_is_counted_in_closed_form():
    weight = torch.ones(64, 32, requires_grad=True)
    live = LiveBytes([weight])
    with live.counting():
        inputs = torch.ones(16, 32)
        output = inputs @ weight.t()
        loss = output.square().sum()
        assert live.now == 4 * (16 * 32 + 16 * 64 + 1)
        assert live.peak == live.now + 4 * 16 * 64  # the squares, until they are summed
        loss.backward()
        del output, loss
    assert weight.grad is not None
    assert live.now == 4 * (16 * 32 + 64 * 32)
    assert inputs.shape == (16, 32)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_tensors_without_memory_give_the_bytes_of_real_ones(monkeypatch, checkpointing, autocast):
    settings = {**SMALL, "checkpointing": checkpointing, "autocast": autocast, "accumulating": True}
    fake = trace_step(small_spec(), **settings)
    monkeypatch.setattr(trace, "_fake", contextlib.nullcontext)
    real = trace_step(small_spec(), **settings)
    assert fake.activations == real.activations
    assert fake.peak == pytest.approx(real.peak, rel=0.02)


@pytest.fixture(scope="module")
def plain():
    return trace_step(small_spec(), **SMALL)


def test_activations_grow_with_the_batch_and_the_area(plain):
    four = trace_step(small_spec(), **{**SMALL, "batch_size": 4})
    larger = trace_step(small_spec(), **{**SMALL, "size_hw": (256, 192)})
    assert four.activations == pytest.approx(4 * plain.activations, rel=0.01)
    assert 1.5 * plain.activations < larger.activations < 2.05 * plain.activations


def test_checkpointing_keeps_less_and_accumulation_needs_more(plain):
    recomputed = trace_step(small_spec(), **{**SMALL, "checkpointing": True})
    accumulating = trace_step(small_spec(), **{**SMALL, "accumulating": True})
    assert recomputed.activations < 0.5 * plain.activations
    assert recomputed.peak < plain.peak < accumulating.peak


def test_longer_captions_need_a_little_more(plain):
    longer = trace_step(small_spec(), **SMALL, num_tokens=3 * 77)
    assert plain.activations < longer.activations < 1.2 * plain.activations


def test_work_without_gradients_is_counted():
    spec, settings = small_spec(), {"dtype": torch.float32, "size_hw": (128, 128)}
    encoded = [trace_encode(spec, batch_size=n, **settings) for n in (1, 4)]
    assert encoded[1] == pytest.approx(4 * encoded[0], rel=0.05)
    assert encoded[0] > 4 * 8 * 128 * 128  # one tensor of the first block
    assert trace_decode(spec, **settings) > encoded[0]
    assert 0 < trace_unet(spec, batch_size=1, **settings) < trace_step(spec, **{**SMALL, **settings}).activations


@pytest.mark.parametrize(("checkpointing", "gib"), [(False, 6.41), (True, 0.55)])
def test_the_full_size_unet_needs_what_was_measured(checkpointing, gib):
    settings = {**SMALL, "dtype": torch.bfloat16, "size_hw": (1024, 1024), "checkpointing": checkpointing}
    assert trace_step(sdxl_spec(), **settings).activations / GIB == pytest.approx(gib, abs=0.01)
