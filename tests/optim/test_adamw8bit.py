import numpy as np
import pytest
import torch
from torch.nn import Parameter

from aquatint.optim.adamw8bit import AdamW8bit
from aquatint.optim.blockwise import dequantise, dynamic_map, quantise
from aquatint.optim.sizes import BLOCK

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wide(seed: int, blocks: int) -> torch.Tensor:
    """Numbers over ten decades, so that every part of the map is used."""
    return randn(seed, blocks * BLOCK) * 10 ** (-10 * torch.rand(blocks * BLOCK, generator=torch.Generator().manual_seed(seed + 1)))


def nearest(values: torch.Tensor, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales by a search in the sorted map, for the nearer of two neighbours."""
    blocks = values.view(-1, BLOCK)
    scale = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    shares = blocks / torch.where(scale == 0, 1.0, scale)
    values = dynamic_map(signed=signed).numpy()
    above = np.clip(np.searchsorted(values, shares.flatten().numpy()), 1, 255)  # the first value that is not below
    takes_lower = shares.flatten().numpy() - values[above - 1] <= values[above] - shares.flatten().numpy()
    return torch.from_numpy(above - takes_lower), scale.flatten()


@pytest.mark.parametrize("signed", [True, False])
def test_each_value_gets_the_nearest_of_the_map(signed):
    values = wide(0, 300) if signed else wide(0, 300).abs()
    code, scale = quantise(values, signed=signed)
    expected_code, expected_scale = nearest(values, signed=signed)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(code.long(), expected_code)
    assert len(code.unique()) == 256


@pytest.mark.parametrize("signed", [True, False])
def test_quantising_twice_is_the_same_as_once(signed):
    values = wide(3, 200) if signed else wide(3, 200).abs()
    code, scale = quantise(values, signed=signed)
    again, scale_again = quantise(dequantise(code, scale, signed=signed), signed=signed)
    assert torch.equal(code, again)
    assert torch.equal(scale, scale_again)


def test_the_value_of_largest_magnitude_is_kept_exactly_whatever_its_sign():
    values = randn(5, 8, BLOCK)
    code, scale = quantise(values.flatten(), signed=True)
    kept = dequantise(code, scale, signed=True).view(8, BLOCK)
    rows = torch.arange(8)
    largest = values.abs().argmax(dim=1)
    assert (scale < 0).any()
    assert (scale > 0).any()
    assert torch.equal(kept[rows, largest], values[rows, largest])


def test_a_block_of_zeros_stays_zero():
    for signed in (True, False):
        code, scale = quantise(torch.zeros(2 * BLOCK), signed=signed)
        assert torch.equal(dequantise(code, scale, signed=signed), torch.zeros(2 * BLOCK))


def test_the_error_is_at_most_half_a_step_of_the_map():
    values = randn(7, 100 * BLOCK)
    kept = dequantise(*quantise(values, signed=True), signed=True)
    scale = values.view(-1, BLOCK).abs().amax(dim=1).repeat_interleave(BLOCK)
    assert ((kept - values).abs() / scale).max() <= 0.9 / 64 / 2 + 1e-6


def reference(param: torch.Tensor, steps: int) -> torch.Tensor:
    """AdamW whose moments are put through the map after every step, in float64 but for the map."""
    param, (beta1, beta2) = param.double(), SETTINGS["betas"]
    moments = [torch.zeros_like(param), torch.zeros_like(param)]
    for step in range(1, steps + 1):
        grad = randn(100 + step, *param.shape).double()
        exp_avg = beta1 * moments[0] + (1 - beta1) * grad
        exp_avg_sq = beta2 * moments[1] + (1 - beta2) * grad**2
        direction = exp_avg / (1 - beta1**step) / ((exp_avg_sq / (1 - beta2**step)).sqrt() + SETTINGS["eps"])
        param = (1 - SETTINGS["lr"] * SETTINGS["weight_decay"]) * param - SETTINGS["lr"] * direction
        for index, (moment, signed) in enumerate([(exp_avg, True), (exp_avg_sq, False)]):
            code, scale = nearest(moment.float().flatten(), signed=signed)
            moments[index] = (dynamic_map(signed=signed)[code].view(-1, BLOCK) * scale.unsqueeze(1)).view(param.shape).double()
    return param


def test_200_steps_are_those_of_a_slow_reference():
    param = Parameter(randn(0, 16, 256))
    optimizer = AdamW8bit([param], **SETTINGS, seed=0)
    expected = reference(param.detach(), 200)
    start = param.detach().clone()
    for step in range(1, 201):
        param.grad = randn(100 + step, 16, 256)
        optimizer.step()
    difference = (param.detach() - expected).norm() / (expected - start).norm()
    assert difference < 0.01  # a moment on the border of two codes may fall to either side: such paths part a little


def test_200_steps_stay_near_those_of_float32_moments():
    ours, theirs = Parameter(randn(0, 64, 64)), Parameter(randn(0, 64, 64))
    optimizers = AdamW8bit([ours], **SETTINGS, seed=0), torch.optim.AdamW([theirs], **SETTINGS)
    start = ours.detach().clone()
    for step in range(200):
        for param, optimizer in zip((ours, theirs), optimizers, strict=True):
            param.grad = randn(500 + step, 64, 64) + 0.3
            optimizer.step()
    moved, expected = ours.detach() - start, theirs.detach() - start
    assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.99
    assert moved.norm().item() == pytest.approx(expected.norm().item(), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "quantised"), [((64, 64), True), ((4095,), False), ((4097,), False), ((16, 8, 4, 8), True)])
def test_small_and_uneven_tensors_keep_float32_moments(dtype, shape, quantised):
    param = Parameter(torch.ones(shape, dtype=dtype))
    optimizer = AdamW8bit([param], seed=0)
    param.grad = torch.ones_like(param)
    optimizer.step()
    state = optimizer.state[param]
    if quantised:
        assert {key: value.dtype for key, value in state.items() if key.endswith("code")} == dict.fromkeys(
            ("exp_avg_code", "exp_avg_sq_code"), torch.uint8
        )
        assert state["exp_avg_scale"].shape == (param.numel() // BLOCK,)
    else:
        assert {key: value.dtype for key, value in state.items()} == dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), torch.float32)


@pytest.mark.parametrize("shape", [(64, 64), (10,)])
def test_a_second_moment_without_gradients_decays(shape):
    param = Parameter(torch.ones(shape, dtype=torch.bfloat16))
    optimizer = AdamW8bit([param], betas=(0.9, 0.999), seed=0)
    values = []
    for step in range(101):
        param.grad = torch.full_like(param, float(step == 0))
        optimizer.step()
        state = optimizer.state[param]
        kept = state.get("exp_avg_sq_code"), state.get("exp_avg_sq_scale")
        moment = state["exp_avg_sq"] if "exp_avg_sq" in state else dequantise(*kept, signed=False)
        values.append(moment.mean().item())
    assert values[100] / values[0] == pytest.approx(0.999**100, rel=1e-3)


def test_a_tensor_in_another_memory_format_is_updated_alike():
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        param = Parameter(randn(0, 32, 16, 3, 3).bfloat16().to(memory_format=layout))
        optimizer = AdamW8bit([param], lr=1e-2, seed=0)
        for step in range(3):
            param.grad = randn(step, 32, 16, 3, 3).bfloat16()
            optimizer.step()
        results.append(param.detach().contiguous())
    assert torch.equal(*results)
