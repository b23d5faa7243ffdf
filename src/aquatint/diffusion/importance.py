"""Timesteps drawn where the loss is large, without changing what is minimised (arXiv 2102.09672, section 3.3).

A history holds the last losses of each of T equal ranges of timesteps, oldest first, NaN where there was none yet: (T, H) float64. The
paper has T = 1000 and H = 10; fewer ranges are known sooner. Under several processes, every one of them must be given the losses
of all, in the order of their positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from aquatint.diffusion.timesteps import Probabilities

History = npt.NDArray[np.float64]

HISTORY_LENGTH = 10
UNIFORM_SHARE = 1e-3


def empty_history(num_ranges: int, length: int = HISTORY_LENGTH) -> History:
    """A history of no losses."""
    return np.full((num_ranges, length), np.nan)


def remember(history: History, ranges: Sequence[int], losses: Sequence[float]) -> History:
    """The history with each loss at the end of its range's, the oldest falling out; losses that are not finite are left out.

    The losses are those that the mean is wanted of: with the loss weight of their timestep, without `importance_weights`.
    """
    history = history.copy()
    for place, loss in zip(ranges, losses, strict=True):
        if np.isfinite(loss):
            history[place] = np.append(history[place, 1:], loss)
    return history


def loss_aware(history: History, base: Probabilities, *, uniform_share: float = UNIFORM_SHARE) -> Probabilities:
    """Probabilities (N,) in proportion to `base` times the root of each range's mean squared loss, mixed with `uniform_share` of `base`.

    It is `base` itself until each range that is ever drawn has its full history. N must be a multiple of the number of ranges.
    Raises ValueError if it is not.
    """
    if len(base) % len(history):
        raise ValueError(f"{len(base)} timesteps cannot be cut into {len(history)} equal ranges")
    within = base.reshape(len(history), -1)
    of_range = within.sum(axis=1)
    if np.isnan(history[of_range > 0]).any():
        return base
    wanted = of_range * np.sqrt(np.square(np.nan_to_num(history)).mean(axis=1))
    if not wanted.sum() > 0:
        return base
    mixed = (1 - uniform_share) * wanted / wanted.sum() + uniform_share * of_range / of_range.sum()
    share = np.divide(mixed, of_range, out=np.zeros_like(mixed), where=of_range > 0)
    probabilities: Probabilities = (within * share[:, None]).reshape(-1)
    return probabilities


def importance_weights(probabilities: Probabilities, base: Probabilities) -> npt.NDArray[np.float64]:
    """What the loss at each timestep is multiplied by, so that its mean is the one over `base`; 0 where nothing is drawn."""
    weights: npt.NDArray[np.float64] = np.divide(base, probabilities, out=np.zeros_like(base), where=probabilities > 0)
    return weights
