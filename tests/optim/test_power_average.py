"""Test vectors of methods, section 10, and what the closed forms promise."""

import numpy as np
import pytest

from aquatint.optim.power_average import gamma_of_std, inner_product, power_decay, solve_mix, std_of_gamma

SNAPSHOTS = tuple(range(500, 8001, 500))  # of a run of 8000 samples, 4 a step
STEP = 4


def trajectory(steps: int, size: int = 5) -> np.ndarray:
    """Weights after each step: they drift to where they end, and never stop to jitter."""
    rng = np.random.default_rng(7)
    drift = np.exp(-np.linspace(0, 6, steps))[:, None] * rng.normal(size=size)
    return drift + 0.3 * rng.normal(size=(steps, size)).cumsum(axis=0) / np.sqrt(steps) + 0.05 * rng.normal(size=(steps, size))


def track(weights: np.ndarray, std: float) -> np.ndarray:
    """The average after each step, as it is kept during a run."""
    averages, average = [], np.full(weights.shape[1], 99.0)
    for step, value in enumerate(weights):
        kept = power_decay((step + 1) * STEP, STEP, gamma_of_std(std))
        average = kept * average + (1 - kept) * value
        averages.append(average)
    return np.array(averages)


def profile(steps: int, std: float) -> np.ndarray:
    """What each step weighs in the average after the last one."""
    return track(np.eye(steps), std)[-1]


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.9721986), (0.10, 6.9372039), (0.15, 3.5578688), (0.2, 1.8262138)])
def test_methods_10_gamma_of_a_relative_standard_deviation_and_back(std: float, gamma: float):
    assert gamma_of_std(std) == pytest.approx(gamma, abs=1e-7)
    assert std_of_gamma(gamma_of_std(std)) == pytest.approx(std, rel=1e-12)


def test_the_widest_profile_is_flat():
    assert gamma_of_std(std_of_gamma(0.0)) == pytest.approx(0.0, abs=1e-9)
    assert std_of_gamma(0.0) == pytest.approx(12**-0.5)


def test_methods_10_decay_at_a_time():
    assert power_decay(1000, 1, gamma_of_std(0.1)) == pytest.approx(0.9920902726, abs=1e-10)
    assert power_decay(8, 8, gamma_of_std(0.1)) == 0.0


def test_methods_10_the_simulated_profile_has_the_mean_and_width_that_it_is_named_after():
    weights = profile(2000, 0.10)
    times = (np.arange(2000) + 0.5) / 2000
    mean = weights @ times
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert mean == pytest.approx(0.888, abs=5e-4)
    assert (weights @ (times - mean) ** 2) ** 0.5 == pytest.approx(0.1000, abs=5e-5)


def test_each_step_weighs_the_integral_of_the_profile_over_its_samples():
    edges = np.arange(51) / 50
    assert profile(50, 0.2) == pytest.approx(np.diff(edges ** (gamma_of_std(0.2) + 1)), abs=1e-14)


@pytest.mark.parametrize(("a", "b"), [((1000, 0.05), (1000, 0.05)), ((700, 0.1), (1000, 0.05)), ((1000, 0.15), (400, 0.1))])
def test_inner_products_are_those_of_the_integral(a: tuple[float, float], b: tuple[float, float]):
    times = (np.arange(200_000) + 0.5) * 1000 / 200_000
    values = []
    for end, std in (a, b):
        gamma = gamma_of_std(std)
        values.append(np.where(times <= end, (gamma + 1) * times**gamma / end ** (gamma + 1), 0.0))
    expected = (values[0] * values[1]).sum() * 1000 / 200_000
    arguments = (a[0], gamma_of_std(a[1]), b[0], gamma_of_std(b[1]))
    assert inner_product(*arguments) == pytest.approx(expected, rel=1e-5)
    assert inner_product(*arguments[2:], *arguments[:2]) == pytest.approx(inner_product(*arguments), rel=1e-12)


def test_what_was_tracked_is_found_as_it_is():
    mix = solve_mix([500, 500, 1000, 1000], [17.0, 7.0, 17.0, 7.0], 1000, 7.0)
    assert mix.shares == pytest.approx([0, 0, 0, 1], abs=1e-12)
    assert mix.residual < 1e-7


def test_the_mix_is_the_nearest_one_to_within_its_normalisation():
    gammas = [gamma_of_std(0.05), gamma_of_std(0.1)] * 8
    times = [float(time) for time in range(100, 900, 100) for _ in range(2)]
    best = solve_mix(times, gammas, 800, gamma_of_std(0.08))
    assert best.shares.sum() == pytest.approx(1.0, abs=1e-12)
    fine = (np.arange(40_000) + 0.5) / 50
    basis = np.array([np.where(fine <= t, (g + 1) / t * (fine / t) ** g, 0.0) for t, g in zip(times, gammas, strict=True)])
    wanted = (gamma_of_std(0.08) + 1) / 800 * (fine / 800) ** gamma_of_std(0.08)
    assert np.linalg.norm(best.shares @ basis - wanted) / np.linalg.norm(wanted) == pytest.approx(best.residual, rel=1e-2)
    free = np.linalg.lstsq(basis.T, wanted)[0]
    assert best.residual == pytest.approx(np.linalg.norm(free @ basis - wanted) / np.linalg.norm(wanted), rel=0.05)


@pytest.mark.parametrize(("std", "end", "tolerance"), [(0.08, 8000, 2e-3), (0.15, 8000, 5e-3), (0.08, 6000, 2e-3), (0.04, 8000, 1e-2)])
def test_methods_10_an_average_of_another_length_is_rebuilt_from_snapshots_of_two(std: float, end: int, tolerance: float):
    """Against the average as it would have been tracked, as a share of how far the weights themselves are from it."""
    weights = trajectory(8000 // STEP)
    tracks = {known: track(weights, known) for known in (0.05, 0.10)}
    found = [(time, known) for time in SNAPSHOTS if time <= end for known in tracks]
    mix = solve_mix([time for time, _ in found], [gamma_of_std(known) for _, known in found], end, gamma_of_std(std))
    rebuilt = sum(share * tracks[known][time // STEP - 1] for share, (time, known) in zip(mix.shares, found, strict=True))
    expected = track(weights, std)[end // STEP - 1]
    assert np.linalg.norm(rebuilt - expected) < tolerance * np.linalg.norm(weights[end // STEP - 1] - expected)
    assert mix.residual < 0.02


def test_what_the_snapshots_cannot_make_has_a_large_residual():
    assert solve_mix([1000.0], [gamma_of_std(0.05)], 1000, gamma_of_std(0.15)).residual > 1
