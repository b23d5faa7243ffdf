import numpy as np
import pytest

from aquatint.diffusion.densities import density
from aquatint.diffusion.importance import empty_history, importance_weights, loss_aware, remember
from aquatint.diffusion.schedule import sdxl_schedule
from aquatint.diffusion.timesteps import draw_timesteps

UNIFORM = np.full(1000, 1e-3)


def full(losses) -> np.ndarray:
    return np.repeat(np.array(losses, dtype=np.float64)[:, None], 10, axis=1)


def test_the_newest_losses_are_remembered():
    history = empty_history(2, length=3)
    for loss in (1.0, 2.0, 3.0, 4.0):
        history = remember(history, [1], [loss])
    assert np.isnan(history[0]).all()
    assert history[1].tolist() == [2, 3, 4]


def test_remembering_changes_no_history_and_leaves_out_what_is_not_finite():
    history = empty_history(1, length=2)
    assert remember(history, [0, 0, 0], [1.0, float("nan"), float("inf")])[0, 1] == 1
    assert np.isnan(history).all()


def test_draws_are_the_base_until_all_is_known():
    history = full([1.0, 4.0])
    history[0, 0] = np.nan
    assert loss_aware(history, UNIFORM) is UNIFORM
    assert loss_aware(full([0.0, 0.0]), UNIFORM) is UNIFORM


def test_ranges_share_their_probability_evenly():
    probabilities = loss_aware(full([1.0, 3.0]), UNIFORM, uniform_share=0.0)
    np.testing.assert_allclose(probabilities[:500], 0.25 / 500)
    np.testing.assert_allclose(probabilities[500:], 0.75 / 500)


def test_the_root_of_the_mean_square_counts():
    history = np.array([[1.0, 7.0], [5.0, 5.0]])
    np.testing.assert_allclose(loss_aware(history, np.full(2, 0.5), uniform_share=0.0), [0.5, 0.5])


def test_a_base_with_a_range_stays_in_its_range():
    base = density("logit_normal", sdxl_schedule(zero_terminal_snr=False), lowest=250, highest=749)
    history = full([np.nan, 2.0, 3.0, np.nan])
    probabilities = loss_aware(history, base)
    assert probabilities[:250].sum() == probabilities[750:].sum() == 0
    assert probabilities.sum() == pytest.approx(1)
    weights = importance_weights(probabilities, base)
    assert weights[:250].sum() == weights[750:].sum() == 0


@pytest.mark.parametrize("num_ranges", [10, 100, 1000])
def test_the_mean_loss_is_not_changed(num_ranges):
    rng = np.random.default_rng(0)
    base = density("logit_normal", sdxl_schedule(zero_terminal_snr=True), uniform_share=0.1)
    probabilities = loss_aware(rng.uniform(0.1, 2, (num_ranges, 10)), base)
    losses = rng.uniform(0, 1, 1000)
    assert probabilities @ (importance_weights(probabilities, base) * losses) == pytest.approx(base @ losses, rel=1e-12)


def test_drawing_where_the_loss_is_large_makes_its_mean_steadier():
    losses = np.repeat([0.01, 0.01, 0.01, 10.0, 0.01], 200)
    probabilities = loss_aware(full([0.01, 0.01, 0.01, 10.0, 0.01]), UNIFORM)
    weights = importance_weights(probabilities, UNIFORM)
    aware = [(weights * losses)[draw_timesteps(seed, range(16), 16, probabilities, spread="independent")].mean() for seed in range(200)]
    even = [losses[draw_timesteps(seed, range(16), 16, spread="independent")].mean() for seed in range(200)]
    assert np.mean(aware) == pytest.approx(losses.mean(), rel=0.02)
    assert np.std(aware) < 0.2 * np.std(even)


def test_ranges_must_cut_the_timesteps_evenly():
    with pytest.raises(ValueError, match="equal ranges"):
        loss_aware(full([1.0, 1.0, 1.0]), UNIFORM)
