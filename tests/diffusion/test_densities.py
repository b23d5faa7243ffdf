import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.diffusion.densities import DENSITIES, MODE_SCALES, density, mode_quantile, sigma_cdf, sigma_edges, tilted, time_cdf, within
from aquatint.diffusion.schedule import edm_schedule, flow_schedule, sdxl_schedule
from aquatint.diffusion.timesteps import draw_timesteps, inverse_cdf, stratified_uniform

PLAIN = sdxl_schedule(zero_terminal_snr=False)
ZERO_TERMINAL = sdxl_schedule(zero_terminal_snr=True)
FLOW = flow_schedule()
SCHEDULES = {"plain": PLAIN, "zero_terminal_snr": ZERO_TERMINAL, "flow": FLOW, "edm": edm_schedule()}
EVERY_DENSITY = pytest.mark.parametrize("name", DENSITIES)
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
UNIFORM = np.full(1000, 1e-3)


def mean_of(probabilities: np.ndarray, values: np.ndarray) -> float:
    return float(probabilities @ values)


@EVERY_DENSITY
@EVERY_SCHEDULE
def test_probabilities_are_a_thousand_and_sum_to_one(name, schedule):
    for options in ({}, {"shift": 3.0, "tilt": 2.0, "uniform_share": 0.1, "terminal_prob": 0.01}, {"lowest": 100, "highest": 700}):
        probabilities = density(name, schedule, **options)
        assert probabilities.shape == (1000,)
        assert probabilities.dtype == np.float64
        assert (probabilities >= 0).all()
        assert probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_uniform_is_uniform():
    assert density("uniform", PLAIN) == pytest.approx(UNIFORM, rel=1e-9)


@EVERY_DENSITY
@EVERY_SCHEDULE
@given(samples=st.integers(1, 64), step=st.integers(0, 10**6), tilt=st.floats(0.25, 4))
@settings(max_examples=5, deadline=None)
def test_stratified_draws_stay_stratified_whatever_the_density(name, schedule, samples, step, tilt):
    """Draw `i` of the sorted ones comes from stratum `i`: as many as expected lie below any timestep, up to one."""
    probabilities = density(name, schedule, tilt=tilt)
    positions = range(step * samples, (step + 1) * samples)
    drawn = np.sort(draw_timesteps(0, positions, samples, probabilities).numpy())
    cumulative = np.concatenate([[0], np.cumsum(probabilities)])
    strata = np.arange(samples) / samples
    assert (cumulative[drawn] < strata + 1 / samples + 1e-9).all()
    assert (cumulative[drawn + 1] > strata - 1e-9).all()
    assert (probabilities[drawn] > 0).all()


@EVERY_DENSITY
def test_many_draws_have_the_density(name):
    probabilities = density(name, ZERO_TERMINAL)
    drawn = draw_timesteps(1, range(20_000), 20_000, probabilities)
    assert np.abs(np.bincount(drawn, minlength=1000) - 20_000 * probabilities).max() < 2


def test_draws_by_density_do_not_depend_on_how_the_positions_are_cut():
    probabilities = density("logit_normal", FLOW)
    whole = draw_timesteps(3, range(24), 8, probabilities)
    parts = [draw_timesteps(3, range(7), 8, probabilities), draw_timesteps(3, range(7, 24), 8, probabilities)]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.dtype == torch.int64


def test_a_table_of_equal_probabilities_draws_what_no_table_draws():
    plain, tabled = draw_timesteps(0, range(4096), 64), draw_timesteps(0, range(4096), 64, UNIFORM)
    assert (plain - tabled).abs().max() <= 1  # a draw on an edge may be rounded to the other side
    assert (plain == tabled).double().mean() > 0.999


def test_timesteps_without_probability_are_never_drawn():
    probabilities = np.zeros(1000)
    probabilities[[3, 500]] = 0.25, 0.75
    uniform = np.array([0.0, 0.2499, 0.25, 0.9, np.nextafter(1.0, 0.0)])
    assert inverse_cdf(probabilities, uniform).tolist() == [3, 3, 500, 500, 500]
    assert inverse_cdf(0.1 * probabilities, uniform).tolist() == [3, 3, 500, 500, 500]


@EVERY_DENSITY
def test_ranges_hold_and_keep_the_shape_within(name):
    whole, part = density(name, PLAIN), density(name, PLAIN, lowest=200, highest=599)
    assert part[:200].sum() == part[600:].sum() == 0
    torch.testing.assert_close(torch.from_numpy(part[200:600] / part[300]), torch.from_numpy(whole[200:600] / whole[300]))


@pytest.mark.parametrize(("lowest", "highest"), [(-1, 10), (10, 9), (0, 1000)])
def test_impossible_ranges_are_refused(lowest, highest):
    with pytest.raises(ValueError, match="must rise within"):
        density("uniform", PLAIN, lowest=lowest, highest=highest)


def test_a_range_without_probability_is_refused():
    with pytest.raises(ValueError, match="never draws a timestep in 0 … 5"):
        within(np.eye(1000)[999], 0, 5)


def test_shares_of_even_draws_and_of_the_last_timestep():
    bare = density("logit_normal", ZERO_TERMINAL)
    mixed = density("logit_normal", ZERO_TERMINAL, uniform_share=0.1)
    np.testing.assert_allclose(mixed, 0.9 * bare + 0.1 * UNIFORM, rtol=1e-12)
    boosted = density("logit_normal", ZERO_TERMINAL, terminal_prob=0.02)
    assert boosted[999] == pytest.approx(0.98 * bare[999] + 0.02)
    np.testing.assert_allclose(boosted[:999], 0.98 * bare[:999], rtol=1e-12)
    assert density("uniform", PLAIN, highest=499, terminal_prob=0.02)[499] > 0.02


def test_logit_normal_starves_pure_noise_unless_mixed():
    assert density("logit_normal", ZERO_TERMINAL)[990:].sum() < 3e-6
    assert density("logit_normal", ZERO_TERMINAL, uniform_share=0.1)[990:].sum() > 9e-4


@pytest.mark.parametrize("scale", [MODE_SCALES[0], 0.0, 1.29, MODE_SCALES[1]])
def test_mode_is_inverted(scale):
    u = np.linspace(0.01, 0.99, 99)
    np.testing.assert_allclose(time_cdf("mode", mode_quantile(u, scale), mode_scale=scale), 1 - u, atol=1e-7)
    assert time_cdf("mode", np.array([0.0, 1.0]), mode_scale=scale) == pytest.approx([0, 1], abs=1e-7)


@pytest.mark.parametrize("scale", [-1.1, 1.8])
def test_modes_that_fold_back_are_refused(scale):
    with pytest.raises(ValueError, match="counts some t twice"):
        density("mode", FLOW, mode_scale=scale)


def test_cosmap_has_the_density_of_its_paper():
    t = (np.arange(1000) + 0.5) / 1000
    np.testing.assert_allclose(1000 * density("cosmap", FLOW), 2 / (np.pi * (1 - 2 * t + 2 * t**2)), rtol=1e-6)


@EVERY_DENSITY
def test_shares_rise_from_nothing_to_all(name):
    t = np.linspace(0, 1, 11)
    with np.errstate(divide="ignore"):
        shares = sigma_cdf(name, t / (1 - t)) if name in ("log_normal", "cosine") else time_cdf(name, t)
    assert shares[[0, -1]].tolist() == pytest.approx([0, 1], abs=1e-8)
    assert (np.diff(shares) > 0).all()


def test_mean_and_std_are_those_of_the_logit_and_of_the_logarithm():
    z = np.array([-1.0, 0.0, 1.0])
    shares = [0.15865525, 0.5, 0.84134475]
    x = np.exp(0.7 + 0.4 * z)
    assert time_cdf("logit_normal", x / (1 + x), mean=0.7, std=0.4).tolist() == pytest.approx(shares)
    assert sigma_cdf("log_normal", x, mean=0.7, std=0.4).tolist() == pytest.approx(shares)


def test_shift_moves_time_towards_noise():
    shifted = density("uniform", FLOW, shift=3.0)
    assert np.cumsum(shifted)[749] == pytest.approx(0.5, abs=1e-9)  # half of the draws lie below 3 x 0.5 / (1 + 2 x 0.5)
    np.testing.assert_allclose(density("logit_normal", FLOW, shift=3.0), density("logit_normal", FLOW, mean=np.log(3)), atol=1e-12)


def test_log_normal_finds_its_noise_on_any_schedule():
    for schedule in (PLAIN, ZERO_TERMINAL, SCHEDULES["edm"]):
        probabilities = density("log_normal", schedule, mean=0.3, std=0.5)
        logs = schedule.ve_sigmas.log().clamp(max=9).numpy()
        mean = mean_of(probabilities, logs)
        assert mean == pytest.approx(0.3, abs=2e-3)
        assert mean_of(probabilities, (logs - mean) ** 2) ** 0.5 == pytest.approx(0.5, abs=2e-3)


def test_cosine_is_even_in_its_angle():
    angles = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(sigma_cdf("cosine", 0.5 * np.tan(np.pi / 2 * angles), sigma_data=0.5), angles, rtol=1e-12)
    np.testing.assert_allclose(density("cosine", FLOW)[1:-1], density("cosmap", FLOW)[1:-1], rtol=3e-3)


@EVERY_SCHEDULE
def test_edges_part_the_noise_levels(schedule):
    edges, ve_sigmas = sigma_edges(schedule), schedule.ve_sigmas.numpy()
    assert edges.shape == (1001,)
    assert (edges[:-1] <= ve_sigmas * (1 + 1e-12)).all()
    assert (ve_sigmas <= edges[1:] * (1 + 1e-12)).all()


@EVERY_DENSITY
@EVERY_SCHEDULE
def test_a_tilt_of_one_changes_nothing(name, schedule):
    np.testing.assert_allclose(density(name, schedule, tilt=1.0), density(name, schedule), rtol=0)


@EVERY_SCHEDULE
@pytest.mark.parametrize("factor", [0.5, 0.9823, 1.5, 2.0])
def test_a_tilt_keeps_every_timestep_and_moves_towards_noise(schedule, factor):
    moved = tilted(UNIFORM, schedule, factor)
    assert (moved > 0).all()
    assert moved.sum() == pytest.approx(1, abs=1e-12)
    difference = np.cumsum(UNIFORM - moved)[:-1]
    assert (difference > 0).all() if factor > 1 else (difference < 0).all()
    back = tilted(moved, schedule, 1 / factor)
    np.testing.assert_allclose(np.cumsum(back), np.cumsum(UNIFORM), atol=2e-4)


def test_a_tilt_multiplies_the_noise_where_it_has_no_upper_end():
    """Medians of the noise, over the least noise there is; on SDXL's own schedule the upper end holds it back."""

    def median(schedule, factor: float) -> float:
        cumulative = np.concatenate([[0], np.cumsum(tilted(UNIFORM, schedule, factor))])
        edges = sigma_edges(schedule)
        times = np.interp(0.5, cumulative, edges / (1 + np.where(np.isinf(edges), 0, edges)))
        return times / (1 - times) - edges[0]

    assert median(ZERO_TERMINAL, 2.0) / median(ZERO_TERMINAL, 1.0) == pytest.approx(2, rel=0.01)
    assert 1.5 < median(PLAIN, 2.0) / median(PLAIN, 1.0) < 2


def test_a_flow_is_tilted_as_it_is_shifted():
    np.testing.assert_allclose(tilted(UNIFORM, FLOW, 2.0)[5:], density("uniform", FLOW, shift=2.0)[5:], rtol=0.02)


def test_the_order_of_strata_survives_the_density():
    """What makes the mean of a step's noise steady: the draws fall in the order of the uniforms."""
    uniform = stratified_uniform(0, range(64), 64)
    drawn = inverse_cdf(density("logit_normal", FLOW), uniform)
    assert (drawn[np.argsort(uniform)] == np.sort(drawn)).all()
