import pytest
import torch

from aquatint.diffusion.schedule import sdxl_schedule
from aquatint.diffusion.weighting import loss_weights

PLAIN = sdxl_schedule(zero_terminal_snr=False).snr
ZERO_TERMINAL = sdxl_schedule(zero_terminal_snr=True).snr


def weights(weighting, prediction, snr, *, gamma=5.0, floor=0.05):
    return loss_weights(weighting, prediction, snr, gamma=gamma, floor=floor)


def test_min_snr_of_epsilon_matches_its_vector():
    table = weights("min_snr", "epsilon", PLAIN)
    assert table[[0, 100, 500, 999]].tolist() == pytest.approx([0.00425362, 0.59144344, 1, 1], rel=2e-6)
    assert table.mean().item() == pytest.approx(0.91657, abs=5e-6)


def test_min_snr_of_v_matches_its_vector():
    table = weights("min_snr", "v_prediction", PLAIN)
    assert table[[100, 500, 999]].tolist() == pytest.approx([0.52888261, 0.27633268, 0.00466010], rel=1e-6)
    assert table[0].item() == pytest.approx(0.00425, abs=5e-6)
    assert table.mean().item() == pytest.approx(0.29433, abs=5e-6)


def test_min_snr_without_floor_never_trains_the_zero_terminal_step():
    table = weights("min_snr", "v_prediction", ZERO_TERMINAL, floor=0.0)
    assert table[998].item() == pytest.approx(1.9679e-7, rel=1e-4)
    assert table[999].item() == 0.0
    assert table.mean().item() == pytest.approx(0.27761, abs=5e-6)
    assert (table[900:].sum() / table.sum()).item() == pytest.approx(0.00032, abs=1e-5)


def test_floor_holds_min_snr_up_with_zero_terminal_snr_only():
    table = weights("min_snr", "v_prediction", ZERO_TERMINAL, floor=0.05)
    assert table.min().item() == pytest.approx(0.05)
    assert torch.equal(table, weights("min_snr", "v_prediction", ZERO_TERMINAL, floor=0.0).clamp(min=0.05))
    assert weights("min_snr", "v_prediction", PLAIN, floor=0.05).min().item() < 0.005


def test_clamped_v_matches_its_vector():
    table = weights("clamped_v", "v_prediction", ZERO_TERMINAL)
    assert table[100].item() == pytest.approx(0.56619358, rel=1e-6)
    assert int((table == 1).nonzero()[0]) == 161
    assert (table[161:] == 1).all()
    assert table.mean().item() == pytest.approx(0.91287, abs=5e-6)


def test_clamped_v_never_grows_towards_clean_pictures():
    assert (weights("clamped_v", "v_prediction", ZERO_TERMINAL).diff() >= 0).all()


@pytest.mark.parametrize("weighting", ["min_snr", "clamped_v"])
def test_epsilon_and_v_weights_say_the_same_about_x0(weighting):
    over_epsilon, over_v = weights(weighting, "epsilon", PLAIN), weights(weighting, "v_prediction", PLAIN)
    torch.testing.assert_close(over_epsilon.double() * PLAIN, over_v.double() * (1 + PLAIN), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 3.0, 20.0])
def test_gamma_is_where_the_weight_on_x0_stops_growing(gamma):
    for weighting in ("min_snr", "clamped_v"):
        over_x0 = weights(weighting, "v_prediction", PLAIN, gamma=gamma).double() * (1 + PLAIN)
        assert over_x0.max().item() == pytest.approx(gamma, rel=1e-6)


def test_no_weighting_is_one_everywhere():
    assert torch.equal(weights("none", "v_prediction", ZERO_TERMINAL), torch.ones(1000))
    assert torch.equal(weights("none", "epsilon", PLAIN), torch.ones(1000))


@pytest.mark.parametrize("weighting", ["none", "min_snr", "clamped_v"])
def test_epsilon_with_zero_terminal_snr_is_refused(weighting):
    with pytest.raises(ValueError, match="needs v_prediction"):
        weights(weighting, "epsilon", ZERO_TERMINAL)


@pytest.mark.parametrize("weighting", ["none", "min_snr", "clamped_v"])
def test_tables_are_finite_float32_by_timestep(weighting):
    for prediction, snr in [("epsilon", PLAIN), ("v_prediction", PLAIN), ("v_prediction", ZERO_TERMINAL)]:
        table = weights(weighting, prediction, snr)
        assert table.shape == (1000,)
        assert table.dtype == torch.float32
        assert table.isfinite().all()
