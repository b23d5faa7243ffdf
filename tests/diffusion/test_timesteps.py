from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.diffusion import timesteps
from aquatint.diffusion.timesteps import (
    draw_timesteps,
    lattice_uniform,
    midpoint_timesteps,
    spread_uniform,
    stratified_uniform,
    trailing_timesteps,
)


class Fixed:
    """A generator whose uniform draws are `uniform` and whose permutations are the identity."""

    def __init__(self, uniform: float) -> None:
        self.uniform = uniform

    def random(self) -> float:
        return self.uniform

    def permutation(self, n: int) -> np.ndarray:
        return np.arange(n)


def test_golden_training_timesteps():
    assert draw_timesteps(0, range(8), 4).tolist() == [816, 567, 9, 319, 357, 25, 630, 752]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), step=st.integers(0, 10**9), samples=st.integers(1, 40))
def test_every_stratum_of_a_step_gets_exactly_one_draw(seed, step, samples):
    uniform = stratified_uniform(seed, range(step * samples, (step + 1) * samples), samples)
    assert sorted(np.floor(uniform * samples).astype(int)) == list(range(samples))


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, 23), samples=st.sampled_from([4, 6, 8]))
def test_draws_do_not_depend_on_how_the_positions_are_cut_into_batches(cut, samples):
    whole = draw_timesteps(3, range(24), samples)
    parts = [draw_timesteps(3, range(cut), samples), draw_timesteps(3, range(cut, 24), samples)]
    assert torch.equal(whole, torch.cat(parts))
    strided = [draw_timesteps(3, range(rank, 24, 2), samples) for rank in range(2)]
    assert torch.equal(whole, torch.stack(strided, dim=1).flatten())


def test_strata_change_places_every_step():
    strata = np.floor(stratified_uniform(0, range(64 * 8), 8).reshape(64, 8) * 8)
    assert len(np.unique(strata, axis=0)) > 55
    assert all(len(np.unique(strata[:, place])) == 8 for place in range(8))


@pytest.mark.parametrize("samples", [1, 3, 64, 1000])
def test_the_largest_draw_there_is_stays_below_timestep_1000(monkeypatch, samples):
    monkeypatch.setattr(timesteps, "generator", lambda *key: Fixed(np.nextafter(1.0, 0.0)))
    drawn = draw_timesteps(0, range(samples), samples)
    assert drawn.max() == 999


def test_variance_of_a_steps_mean_falls_with_the_cube_of_its_samples():
    means = stratified_uniform(1, range(8 * 1500), 8).reshape(1500, 8).mean(axis=1)
    assert means.var() == pytest.approx(1 / (12 * 8**3), rel=0.15)


def test_training_timesteps_are_uniform_from_first_to_last():
    drawn = draw_timesteps(5, range(20_000), 20_000)
    assert drawn.dtype == torch.int64
    assert (torch.bincount(drawn, minlength=1000) == 20).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), step=st.integers(0, 10**9), samples=st.integers(1, 40))
def test_a_lattice_is_even_and_shared_by_the_whole_step(seed, step, samples):
    positions = range(step * samples, (step + 1) * samples)
    uniform = lattice_uniform(seed, positions, samples)
    assert ((uniform >= 0) & (uniform < 1)).all()
    np.testing.assert_allclose(np.diff(np.sort(uniform)), 1 / samples, atol=1e-12)
    assert lattice_uniform(seed, positions[-1:], samples)[0] == uniform[-1]


def test_places_on_the_lattice_change_every_step():
    places = np.argsort(lattice_uniform(0, range(64 * 8), 8).reshape(64, 8), axis=1)
    assert len(np.unique(places, axis=0)) > 55


def test_draws_are_spread_as_asked():
    assert (spread_uniform("strata", 3, range(8), 4) == stratified_uniform(3, range(8), 4)).all()
    assert (spread_uniform("lattice", 3, range(8), 4) == lattice_uniform(3, range(8), 4)).all()
    assert (spread_uniform("independent", 3, range(8), 4) == stratified_uniform(3, range(8), 1)).all()
    assert torch.equal(draw_timesteps(3, range(8), 4, spread="strata"), draw_timesteps(3, range(8), 4))
    assert not torch.equal(draw_timesteps(3, range(8), 4, spread="lattice"), draw_timesteps(3, range(8), 4))


def test_without_stratification_every_place_is_uniform():
    counts = np.histogram(stratified_uniform(2, range(4000), 1), bins=10, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 16, 30, 48, 333, 999, 1000])
def test_trailing_timesteps_start_at_the_end_and_fall(num_steps):
    drawn = trailing_timesteps(num_steps)
    assert len(drawn) == num_steps
    assert drawn[0] == 999
    assert drawn[-1] >= 0
    assert all(later < earlier for earlier, later in pairwise(drawn))


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_numbers_of_sampling_steps_are_refused(num_steps):
    with pytest.raises(ValueError, match="1 to 1000"):
        trailing_timesteps(num_steps)


@pytest.mark.parametrize("num_timesteps", [1, 3, 7, 100])
def test_each_midpoint_lies_in_its_own_stratum(num_timesteps):
    strata = [timestep * num_timesteps // 1000 for timestep in midpoint_timesteps(num_timesteps, terminal=False)]
    assert strata == list(range(num_timesteps))
