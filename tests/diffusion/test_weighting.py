import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.diffusion.parameterization import PREDICTIONS
from aquatint.diffusion.schedule import STAND_INS, flow_schedule, sdxl_schedule
from aquatint.diffusion.weighting import WEIGHTINGS, error_ratio, loss_weights, normalised, weights_x0

PLAIN = sdxl_schedule(zero_terminal_snr=False).snr
ZERO_TERMINAL = sdxl_schedule(zero_terminal_snr=True).snr
FLOW = flow_schedule().snr
VANISHING = ("min_snr", "soft_min_snr", "debiased", "p2", "like_epsilon")
EVERY_WEIGHTING = pytest.mark.parametrize("weighting", WEIGHTINGS)


def weights(weighting, prediction, snr, *, gamma=5.0, floor=0.05, **options):
    return loss_weights(weighting, prediction, snr, gamma=gamma, floor=floor, **options)


@pytest.mark.parametrize("weighting", VANISHING)
@pytest.mark.parametrize("prediction", ["v_prediction", "x0", "edm"])
def test_floor_holds_weights_up_with_zero_terminal_snr_only(weighting, prediction):
    bare = weights(weighting, prediction, ZERO_TERMINAL, floor=0.0)
    assert bare[999].item() == 0.0
    table = weights(weighting, prediction, ZERO_TERMINAL, floor=0.05)
    assert table.min().item() == pytest.approx(0.05)
    assert torch.equal(table, bare.clamp(min=0.05))
    assert torch.equal(weights(weighting, prediction, PLAIN, floor=0.05), weights(weighting, prediction, PLAIN, floor=0.0))


@pytest.mark.parametrize("weighting", [name for name in WEIGHTINGS if name not in VANISHING])
def test_other_weights_train_pure_noise_by_themselves(weighting):
    table = weights(weighting, "v_prediction", ZERO_TERMINAL, floor=0.0)
    assert table[999].item() > 0.1
    assert torch.equal(table, weights(weighting, "v_prediction", ZERO_TERMINAL, floor=0.05))


def test_clamped_v_never_grows_towards_clean_pictures():
    assert (weights("clamped_v", "v_prediction", ZERO_TERMINAL).diff() >= 0).all()


@pytest.mark.parametrize("weighting", [name for name in WEIGHTINGS if name != "none"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(gamma=st.floats(0.5, 30), sigma_data=st.floats(0.2, 2), p2_gamma=st.floats(0.2, 2))
@settings(max_examples=5, deadline=None)
def test_all_predictions_say_the_same_about_x0(weighting, prediction, gamma, sigma_data, p2_gamma):
    options = {"gamma": gamma, "p2_gamma": p2_gamma}
    table = weights(weighting, prediction, PLAIN, sigma_data=sigma_data, **options)
    over_x0 = table.double() * error_ratio(prediction, PLAIN, sigma_data)
    torch.testing.assert_close(over_x0, weights_x0(weighting, PLAIN, **options), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 3.0, 20.0])
def test_gamma_is_where_the_weight_on_x0_stops_growing(gamma):
    for weighting in ("min_snr", "clamped_v"):
        over_x0 = weights(weighting, "v_prediction", PLAIN, gamma=gamma).double() * (1 + PLAIN)
        assert over_x0.max().item() == pytest.approx(gamma, rel=1e-6)
    assert weights_x0("soft_min_snr", torch.tensor(1e12), gamma=gamma).item() == pytest.approx(gamma, rel=1e-6)


def test_each_scheme_has_its_shape_on_its_own_output():
    """The columns that the papers write them in."""
    snr = PLAIN
    torch.testing.assert_close(weights("debiased", "epsilon", snr).double(), snr**-0.5, rtol=1e-6, atol=0)
    torch.testing.assert_close(weights("p2", "epsilon", snr).double(), 1 / (1 + snr), rtol=1e-6, atol=0)
    torch.testing.assert_close(weights("p2", "epsilon", snr, p2_k=3.0, p2_gamma=0.5).double(), (3 + snr) ** -0.5, rtol=1e-6, atol=0)
    torch.testing.assert_close(weights("truncated", "epsilon", snr).double(), (1 / snr).clamp(min=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(weights("soft_min_snr", "epsilon", snr).double(), 5 / (snr + 5), rtol=1e-6, atol=0)
    torch.testing.assert_close(weights("sigma_sqrt", "flow", snr).double(), (1 + snr.sqrt()) ** 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(weights("like_epsilon", "epsilon", snr), torch.ones(1000))
    torch.testing.assert_close(weights("like_epsilon", "v_prediction", snr).double(), snr / (1 + snr), rtol=1e-6, atol=0)
    torch.testing.assert_close(weights("like_v", "v_prediction", ZERO_TERMINAL), torch.ones(1000))
    torch.testing.assert_close(weights("like_v", "edm", snr), torch.ones(1000))


def test_no_weighting_is_one_everywhere():
    assert torch.equal(weights("none", "v_prediction", ZERO_TERMINAL), torch.ones(1000))
    assert torch.equal(weights("none", "epsilon", PLAIN), torch.ones(1000))
    with pytest.raises(ValueError, match="no weight on x0"):
        weights_x0("none", PLAIN)


@EVERY_WEIGHTING
@pytest.mark.parametrize("snr", [ZERO_TERMINAL, FLOW], ids=["zero_terminal_snr", "flow"])
def test_epsilon_with_pure_noise_is_refused(weighting, snr):
    with pytest.raises(ValueError, match="needs v_prediction"):
        weights(weighting, "epsilon", snr)


@EVERY_WEIGHTING
@pytest.mark.parametrize("ve_sigma", STAND_INS.values(), ids=STAND_INS)
def test_a_samplers_stand_in_for_pure_noise_is_no_training_schedule(weighting, ve_sigma):
    snr = sdxl_schedule(zero_terminal_snr=True).ending_at(ve_sigma).snr
    with pytest.raises(ValueError, match="exact zero"):
        weights(weighting, "v_prediction", snr)


def test_sigma_sqrt_is_refused_where_it_explodes():
    with pytest.raises(ValueError, match="1,000,000 times"):
        weights("sigma_sqrt", "flow", FLOW)
    with pytest.raises(ValueError, match="12,346 times"):
        weights("sigma_sqrt", "flow", FLOW[8:])
    assert weights("sigma_sqrt", "flow", FLOW[10:])[0].item() == pytest.approx(1 / 0.011**2, rel=1e-6)
    assert weights("sigma_sqrt", "flow", FLOW[100:]).max().item() == pytest.approx(1 / 0.101**2, rel=1e-6)


@EVERY_WEIGHTING
def test_tables_are_finite_float32_by_timestep(weighting):
    pairs = [("epsilon", PLAIN), ("v_prediction", PLAIN), ("v_prediction", ZERO_TERMINAL), ("x0", PLAIN), ("edm", ZERO_TERMINAL)]
    for prediction, snr in [*pairs, *([] if weighting == "sigma_sqrt" else [("flow", FLOW)])]:
        table = weights(weighting, prediction, snr)
        assert table.shape == (1000,)
        assert table.dtype == torch.float32
        assert table.isfinite().all()


@EVERY_WEIGHTING
def test_normalised_weights_have_a_mean_of_one_where_timesteps_come(weighting):
    density = torch.linspace(0, 1, 1000, dtype=torch.float64).square()
    table = weights(weighting, "v_prediction", ZERO_TERMINAL)
    even = normalised(table, density / density.sum())
    assert even.dtype == torch.float32
    assert (even.double() * density).sum().item() / density.sum().item() == pytest.approx(1, rel=1e-6)
    torch.testing.assert_close(even / even[500], table / table[500])


def test_timesteps_without_weight_cannot_be_normalised():
    density = torch.zeros(1000)
    density[999] = 1
    with pytest.raises(ValueError, match="no weight"):
        normalised(weights("min_snr", "v_prediction", ZERO_TERMINAL, floor=0.0), density)
