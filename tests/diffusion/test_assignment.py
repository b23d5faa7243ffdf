from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.diffusion.assignment import cheapest_assignment


def total(costs: np.ndarray, columns) -> float:
    return costs[np.arange(len(costs)), list(columns)].sum()


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(st.integers(-5, 5), min_size=n, max_size=n), min_size=n, max_size=n)))
def test_no_permutation_is_cheaper(rows):
    """Small whole numbers, for many ties."""
    costs = np.array(rows, dtype=np.float64)
    columns = cheapest_assignment(costs)
    assert sorted(columns) == list(range(len(costs)))
    assert total(costs, columns) == min(total(costs, p) for p in permutations(range(len(costs))))


@pytest.mark.parametrize("size", [2, 17, 96])
def test_a_planted_assignment_is_found(size):
    """Prices on rows and columns change no comparison between permutations, and hide the one that is free."""
    rng = np.random.default_rng(size)
    planted = rng.permutation(size)
    costs = rng.uniform(0.1, 1, (size, size))
    costs[np.arange(size), planted] = 0
    costs += rng.normal(size=(size, 1)) * 100 + rng.normal(size=(1, size)) * 100
    assert cheapest_assignment(costs).tolist() == planted.tolist()


def test_nobody_needs_no_partner():
    assert cheapest_assignment(np.zeros((0, 0))).tolist() == []


@pytest.mark.parametrize("costs", [np.zeros((2, 3)), np.zeros(4), np.array([[np.nan]]), np.array([[1.0, np.inf], [0.0, 1.0]])])
def test_other_tables_are_refused(costs):
    with pytest.raises(ValueError, match="square table of finite costs"):
        cheapest_assignment(costs)
