"""How far two sets of pictures are apart, from embeddings of them: arrays (N, D), one row per picture, from an encoder of the user's.

Float64 throughout: these are small differences of large sums.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.floating]

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
_BLOCK = 2048


class Moments(NamedTuple):
    """Mean (D,) and covariance (D, D) of embeddings."""

    mean: Array
    covariance: Array


def moments(embeddings: Rows) -> Moments:
    """Raises ValueError for fewer than two rows, which have no covariance."""
    rows = _checked(embeddings)
    if len(rows) < 2:
        raise ValueError("a covariance needs at least two embeddings")
    return Moments(rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False)))


def frechet_distance(one: Moments, other: Moments) -> float:
    """|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^1/2) (arXiv 1706.08500, equation 6): FID with Inception's, FD-DINOv2 with DINOv2's embeddings.

    The trace of the root is the sum of the roots of the eigenvalues of C1^1/2 C2 C1^1/2, which is symmetric: no complex numbers, and
    no harm from covariances of fewer pictures than dimensions.
    """
    values, vectors = np.linalg.eigh(one.covariance)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ other.covariance @ root).clip(min=0)).sum()
    difference = one.mean - other.mean
    return float(difference @ difference + np.trace(one.covariance) + np.trace(other.covariance) - 2 * cross)


def cmmd(one: Rows, other: Rows, *, sigma: float = CMMD_SIGMA, scale: float = CMMD_SCALE) -> float:
    """1000 times the squared maximum mean discrepancy under the kernel exp(-|x - y|^2 / 2 sigma^2) (arXiv 2401.09603).

    Rows are brought to length 1. It is the V-statistic, each mean over all pairs and so with the diagonal, and never below 0.
    Raises ValueError for a row of length 0.
    """
    x, y = _unit(one), _unit(other)
    value = _mean_kernel(x, x, sigma) + _mean_kernel(y, y, sigma) - 2 * _mean_kernel(x, y, sigma)
    return max(0.0, scale * value)


def clip_score(images: Rows, texts: Rows) -> float:
    """100 times the mean cosine between each picture and its own text, negative ones counted as 0 (arXiv 2104.08718)."""
    x, y = _unit(images), _unit(texts)
    if x.shape != y.shape:
        raise ValueError(f"each picture needs its text: got {x.shape} and {y.shape}")
    return float(100 * (x * y).sum(axis=1).clip(min=0).mean())


def _mean_kernel(x: Array, y: Array, sigma: float) -> float:
    """Of unit vectors, |x - y|^2 = 2 - 2 x y. Summed in blocks: ten thousand pictures would make a table of 800 MB."""
    total = 0.0
    for start in range(0, len(x), _BLOCK):
        total += float(np.exp((x[start : start + _BLOCK] @ y.T - 1) / sigma**2).sum())
    return total / (len(x) * len(y))


def _unit(embeddings: Rows) -> Array:
    rows = _checked(embeddings)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise ValueError("an embedding of length 0 has no direction")
    unit: Array = rows / lengths
    return unit


def _checked(embeddings: Rows) -> Array:
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2 or not len(rows) or not np.isfinite(rows).all():
        raise ValueError(f"embeddings must be finite and of shape (N, D), got shape {rows.shape}")
    return rows
