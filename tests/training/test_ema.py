import contextlib

import pytest
import torch

from aquatint.training.ema import Ema, averaged, decay_at


def one_weight(value: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    return {"w": torch.nn.Parameter(torch.full((3,), value, dtype=dtype))}


@pytest.mark.parametrize(("t", "expected"), [(10, 0.55), (1000, 1001 / 1010)])
def test_warm_up_follows_the_closed_form(t: int, expected: float):
    assert decay_at(t - 1, decay=0.9999, warmup=True) == pytest.approx(expected, rel=1e-12)


def test_warm_up_ends_at_the_decay():
    assert decay_at(10**6, decay=0.9999, warmup=True) == 0.9999
    assert decay_at(0, decay=0.9, warmup=False) == 0.9


def test_the_average_moves_towards_the_weights_as_the_closed_form_says():
    parameters = one_weight(0.5)
    ema = Ema(parameters, decay=0.99, warmup=False, device=None)
    with torch.no_grad():
        parameters["w"].fill_(1.0)
    for step in range(100):
        ema.update(step)
    assert ema.average["w"][0].item() == pytest.approx(1 - 0.5 * 0.99**100, rel=1e-5)


def test_the_average_of_half_precision_weights_moves_by_less_than_their_precision():
    parameters = one_weight(0.5, torch.bfloat16)
    ema = Ema(parameters, decay=0.9999, warmup=False, device=None)
    with torch.no_grad():
        parameters["w"].fill_(1.0)
    for step in range(100):
        ema.update(step)
    assert ema.average["w"].dtype == torch.float32
    assert ema.average["w"][0].item() == pytest.approx(1 - 0.5 * 0.9999**100, rel=1e-5)


def test_applied_puts_the_weights_back_bit_for_bit():
    parameters = one_weight(0.1, torch.bfloat16)
    before = parameters["w"].detach().clone()
    ema = Ema(parameters, decay=0.9, warmup=False, device=None)
    ema.average["w"].fill_(0.7)
    with contextlib.suppress(RuntimeError), averaged(ema):
        assert parameters["w"][0].item() == pytest.approx(0.7, rel=1e-2)
        raise RuntimeError("also after an error")
    assert torch.equal(parameters["w"], before)
