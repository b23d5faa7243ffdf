"""Averages that weigh time by a power, and how one of any length is put together afterwards (EDM2, arXiv 2312.02696, section 3).

An average of exponent gamma at time t weighs the weights at time s by (gamma + 1) s^gamma / t^(gamma + 1), s from 0 to t, so its memory
grows with the run. Its relative standard deviation `std` is the width of that profile as a share of t. Times are in samples from the
start of the run. Weights that stay the same from one step to the next are averaged by this exactly, however long the steps are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def gamma_of_std(std: float) -> float:
    """The exponent of a relative standard deviation below 0.288, where it is 0: the largest root of a cubic (appendix C)."""
    squared = float(std) ** -2
    return float(np.roots([1.0, 7.0, 16.0 - squared, 12.0 - squared]).real.max())


def std_of_gamma(gamma: float) -> float:
    """The relative standard deviation of an exponent: its square is (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (section 3.1)."""
    return float(((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5)


def power_decay(samples: float, step_samples: float, gamma: float) -> float:
    """The share that is kept by a step of `step_samples` that ends at `samples` (section 3.1). The first step keeps nothing."""
    return float((1.0 - step_samples / samples) ** (gamma + 1.0))


def inner_product(samples_a: ArrayLike, gamma_a: ArrayLike, samples_b: ArrayLike, gamma_b: ArrayLike) -> Array:
    """The integral of the product of two profiles, in float64 and per sample (appendix C). Arguments are broadcast."""
    t_a, g_a, t_b, g_b = (np.asarray(value, np.float64) for value in (samples_a, gamma_a, samples_b, gamma_b))
    ratio = (t_a / t_b) ** np.where(t_a < t_b, g_b, -g_a)
    return np.asarray((g_a + 1) * (g_b + 1) * ratio / ((g_a + g_b + 1) * np.maximum(t_a, t_b)))


@dataclass(frozen=True)
class Mix:
    """How much of each snapshot makes an average; together 1.

    `residual` is the length of the difference between its profile and the wanted one, as a share of the length of the latter.
    """

    shares: Array
    residual: float


def solve_mix(samples: Sequence[float], gammas: Sequence[float], wanted_samples: float, wanted_gamma: float) -> Mix:
    """The mix of snapshots, given their times and exponents, whose profile is nearest to the wanted one (section 3.2).

    Raises numpy.linalg.LinAlgError if a snapshot is given twice.
    """
    times, exponents = np.asarray(samples, np.float64), np.asarray(gammas, np.float64)
    products = inner_product(times[:, None], exponents[:, None], times[None], exponents[None])
    wanted = inner_product(times, exponents, wanted_samples, wanted_gamma)
    scale = 1 / np.sqrt(np.diag(products))  # as if all profiles had length 1, which keeps the equations well-conditioned
    shares = scale * np.linalg.solve(products * scale[:, None] * scale, wanted * scale)
    shares /= shares.sum()
    length = float(inner_product(wanted_samples, wanted_gamma, wanted_samples, wanted_gamma))
    distance = float(shares @ products @ shares - 2 * shares @ wanted) + length
    return Mix(shares, max(0.0, distance / length) ** 0.5)
