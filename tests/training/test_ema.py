import contextlib

import pytest
import torch

from aquatint.optim.power_average import gamma_of_std, power_decay
from aquatint.training.ema import Ema, averaged, decay_at, decay_of_half_life


def one_weight(value: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    return {"w": torch.nn.Parameter(torch.full((3,), value, dtype=dtype))}


@pytest.mark.parametrize(("t", "expected"), [(10, 0.55), (1000, 1001 / 1010)])
def test_methods_10_warm_up_follows_the_closed_form(t: int, expected: float):
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


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_device_decides_whether_the_average_moves(decay: float):
    parameters = {"w": torch.nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)))}
    emas = [Ema(parameters, decay=decay, warmup=False, device=None, power_stds=(0.1,), samples_per_step=2) for _ in range(2)]
    with torch.no_grad():
        parameters["w"].mul_(1.7)
    emas[0].update(3)
    emas[1].update(3, finite=torch.tensor(True))
    moved = emas[1].average["w"].clone()
    assert torch.equal(moved, emas[0].average["w"])
    assert torch.equal(emas[1].tracks[0.1]["w"], emas[0].tracks[0.1]["w"])
    emas[1].update(4, finite=torch.tensor(False))
    assert torch.equal(moved, emas[1].average["w"])
    assert torch.equal(emas[1].tracks[0.1]["w"], emas[0].tracks[0.1]["w"])


def test_applied_puts_the_weights_back_bit_for_bit():
    parameters = one_weight(0.1, torch.bfloat16)
    before = parameters["w"].detach().clone()
    ema = Ema(parameters, decay=0.9, warmup=False, device=None)
    ema.average["w"].fill_(0.7)
    with contextlib.suppress(RuntimeError), averaged(ema):
        assert parameters["w"][0].item() == pytest.approx(0.7, rel=1e-2)
        raise RuntimeError("also after an error")
    assert torch.equal(parameters["w"], before)


@pytest.mark.parametrize(("steps", "decay"), [(6931, 0.9999), (692.8, 0.999)])
def test_methods_10_a_half_life_is_the_decay_of_its_steps(steps: float, decay: float):
    assert decay_of_half_life(steps, 1) == pytest.approx(decay, rel=1e-7)


@pytest.mark.parametrize("samples_per_step", [1, 4, 50])
def test_after_a_half_life_the_past_counts_half_whatever_the_size_of_a_step(samples_per_step: int):
    parameters = one_weight(0.0)
    decay = decay_of_half_life(1000, samples_per_step)
    ema = Ema(parameters, decay=decay, warmup=False, device=None, samples_per_step=samples_per_step)
    with torch.no_grad():
        parameters["w"].fill_(1.0)
    for step in range(1000 // samples_per_step):
        ema.update(step)
    assert ema.average["w"][0].item() == pytest.approx(0.5, rel=1e-5)


def grow(ema: Ema, parameters: dict[str, torch.nn.Parameter], steps: range) -> None:
    """The weight is the number of the step, from 1."""
    for step in steps:
        with torch.no_grad():
            parameters["w"].fill_(step + 1.0)
        ema.update(step)


def test_the_power_averages_are_those_of_the_closed_form():
    parameters = one_weight(99.0, torch.bfloat16)
    ema = Ema(parameters, decay=0.9, warmup=False, device=None, power_stds=(0.05, 0.2), samples_per_step=3)
    grow(ema, parameters, range(1))
    assert [track["w"][0].item() for track in ema.tracks.values()] == [1.0, 1.0]
    grow(ema, parameters, range(1, 40))
    for std, track in ema.tracks.items():
        power = gamma_of_std(std) + 1
        expected = sum(step * (step**power - (step - 1) ** power) for step in range(1, 41)) / 40**power
        assert track["w"].dtype == torch.float32
        assert track["w"][0].item() == pytest.approx(expected, rel=1e-5)


def test_a_run_that_goes_on_counts_the_samples_from_its_own_start():
    """Also when its steps are larger from there on."""
    parameters = one_weight(0.0)
    before = Ema(parameters, decay=0.9, warmup=False, device=None, power_stds=(0.1,), samples_per_step=2)
    after = Ema(parameters, decay=0.9, warmup=False, device=None, power_stds=(0.1,), samples_per_step=4)
    grow(before, parameters, range(10))
    after.tracks[0.1]["w"].copy_(before.tracks[0.1]["w"])
    after.start_at(10, 20)
    grow(after, parameters, range(10, 11))
    kept = power_decay(24, 4, gamma_of_std(0.1))
    assert after.tracks[0.1]["w"][0].item() == pytest.approx(kept * before.tracks[0.1]["w"][0].item() + (1 - kept) * 11, rel=1e-6)


def test_each_average_has_a_file_of_its_own():
    ema = Ema(one_weight(0.0), decay=0.9, warmup=False, device=None, power_stds=(0.05, 0.1))
    assert list(ema.tables()) == ["ema", "power-0.050", "power-0.100"]
    assert len({id(table["w"]) for table in ema.tables().values()}) == 3
