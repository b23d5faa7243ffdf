"""Reference values of the formulas behind the optimizers, by hand or from the papers."""

import pytest
import torch
from torch.nn import Parameter

from aquatint.optim.adafactor import clip_scale, factored, second_moment_decay
from aquatint.optim.adamw8bit import AdamW8bit
from aquatint.optim.adamw_bf16 import AdamWBF16, compensate_, compensated
from aquatint.optim.blockwise import dequantise, dynamic_map, quantise
from aquatint.optim.clipping import Clipping
from aquatint.optim.formula import adamw
from aquatint.optim.fused import FusedBackward
from aquatint.optim.rounding import draw_for, round_stochastic

ALL_BITS = torch.arange(65536, dtype=torch.int32)


def test_adamw_two_steps():
    settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    values = torch.tensor([1.0]), torch.zeros(1), torch.zeros(1)
    for step, expected in [(1, 0.9989900001), (2, 0.9979800103)]:
        values = adamw(values[0], torch.tensor([0.1]), *values[1:], step=step, **settings)
        assert values[0].item() == pytest.approx(expected, rel=1e-7)


def test_bf16_an_eighth_of_a_step_is_rounded_up_one_time_in_eight():
    rounded = round_stochastic(torch.full((65536,), 1 + 2**-10), ALL_BITS)
    assert (rounded > 1).float().mean().item() == 0.125


def test_bf16_updates_below_half_a_step_vanish_when_rounded_to_the_nearest():
    near = torch.tensor(0.02).bfloat16()
    assert (near.view(torch.int16) + 1).view(torch.bfloat16).float() - near.float() == pytest.approx(1.22e-4, rel=1e-3)
    assert (near.float() + 6.0e-5).bfloat16() == near


def test_bf16_a_thousand_small_steps():
    plain, param, compensation = (torch.tensor(value, dtype=torch.bfloat16) for value in (1.0, 1.0, 0.0))
    update = torch.tensor(-1e-4, dtype=torch.bfloat16)
    for _ in range(1000):
        plain += update
        compensation += update
        before = param.clone()
        param += compensation
        compensation += before - param
    assert plain.item() == 1.0
    assert (param.item(), (param.float() + compensation.float()).item()) == (0.90234375, pytest.approx(0.90056, abs=1e-5))


def test_bf16_a_thousand_small_steps_with_what_rounding_leaves_kept_without_bias():
    param, compensation = torch.ones(1000).bfloat16(), torch.zeros(1000).bfloat16()
    for step in range(1000):
        random_bits = draw_for(param, (0, step))[-1]
        compensate_(param, compensation, compensated(param, compensation) - 1e-4, random_bits)
    ends = compensated(param, compensation)
    assert ends.mean().item() == pytest.approx(0.9, abs=3e-5)
    assert ends.std().item() < 2e-4  # stochastic rounding of the weight itself spreads by 0.0195
    assert (param == 0.8984375).all()  # the bfloat16 nearest to 0.9


@pytest.mark.parametrize("optimizer_of", [AdamWBF16, AdamW8bit])
def test_bf16_a_second_moment_decays_by_0_999(optimizer_of):
    """bf16(0.999 v) is v: rounded to the nearest it would stay for ever."""
    assert (torch.tensor(0.999).bfloat16() * 1).item() == 1.0
    param = Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = optimizer_of([param], lr=0.0, seed=0)
    for step in range(201):
        param.grad = torch.full_like(param, float(step == 0))
        optimizer.step()
    state = optimizer.state[param]
    moment = state["exp_avg_sq"] if "exp_avg_sq" in state else dequantise(state["exp_avg_sq_code"], state["exp_avg_sq_scale"], signed=False)
    assert moment.float().mean().item() == pytest.approx(0.001 * 0.999**200, rel=0.01)


def test_bf16_moments_are_those_of_the_formula_not_of_a_sum_the_wrong_way_round():
    """A constant gradient of 0.1 gives a first moment of 0.040951 after 5 steps."""
    param = Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = AdamWBF16([param], lr=0.0, seed=0)
    for _ in range(5):
        param.grad = torch.full_like(param, 0.1)
        optimizer.step()
    assert optimizer.state[param]["exp_avg"].float().mean().item() == pytest.approx(0.040951, rel=2e-3)  # bf16(0.1) is 0.1001


def test_adafactor_first_update():
    grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    factors, row, col = factored(grad, torch.zeros(2), torch.zeros(2), second_moment_decay(1, 0.8))
    update = grad * factors.left * factors.right
    assert (row.tolist(), col.tolist()) == ([2.5, 12.5], [5.0, 10.0])
    assert (grad / update).square().flatten().tolist() == pytest.approx([1.66666667, 3.33333333, 8.33333333, 16.66666667], rel=1e-6)
    assert update.flatten().tolist() == pytest.approx([0.77459667, 1.09544512, 1.03923048, 0.97979590], rel=1e-6)
    assert update.square().mean().sqrt().item() == pytest.approx(0.97979590, rel=1e-6)
    assert clip_scale(grad, factors, 1.0) == 1.0
    assert [second_moment_decay(step, 0.8) for step in (2, 100)] == pytest.approx([0.42565082, 0.97488114], rel=1e-6)


def test_8_bit_the_signed_map():
    values = dynamic_map(signed=True)
    assert len(values.unique()) == 256
    assert values.argmin().item() == 0
    assert (values.min().item(), values.max().item()) == (pytest.approx(-0.99296875), 1.0)
    assert values[127] == 0
    assert values[128].item() == pytest.approx(5.5e-7)


def test_8_bit_the_unsigned_map():
    values = dynamic_map(signed=False)
    assert len(values.unique()) == 256
    assert (values[0].item(), values[1].item(), values[255].item()) == (0.0, pytest.approx(3.25e-7), 1.0)


@pytest.mark.parametrize(("signed", "kept"), [(True, [0.50078125, 0.00094375, 0.0]), (False, [0.49726563, 0.00097188, 0.0])])
def test_8_bit_some_values(signed, kept):
    block = torch.zeros(256)
    block[:4] = torch.tensor([1.0, 0.5, 1e-3, 1e-7])
    code, scale = quantise(block, signed=signed)
    found = dequantise(code, scale, signed=signed)
    assert scale.tolist() == [1.0]
    assert found[1:4].tolist() == pytest.approx(kept, rel=1e-5)
    again = quantise(found, signed=signed)
    assert torch.equal(code, again[0])
    assert torch.equal(scale, again[1])


def test_inside_the_backward_pass_a_clip_of_the_whole_gradient_is_refused():
    optimizer = AdamWBF16([Parameter(torch.ones(3))], seed=0)
    with pytest.raises(ValueError, match="whole gradient"):
        FusedBackward(optimizer, Clipping("global", 1.0))
