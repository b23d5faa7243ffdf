"""Classifier-free guidance."""

from __future__ import annotations

from torch import Tensor


def guide(positive: Tensor, negative: Tensor, scale: float, rescale: float) -> Tensor:
    """Guided output (B, C, H, W): negative + scale (positive - negative) (arXiv 2207.12598, equation 6, scale = 1 + w).

    `rescale` in [0, 1] moves it towards the strength of the positive output, see `match_strength`.
    """
    guided = negative + scale * (positive - negative)
    return guided + rescale * (match_strength(guided, positive) - guided) if rescale else guided


def match_strength(guided: Tensor, positive: Tensor) -> Tensor:
    """`guided`, scaled per sample to the standard deviation of `positive` (arXiv 2305.08891, section 3.4)."""
    return guided * (_std(positive) / _std(guided))


def _std(x: Tensor) -> Tensor:
    """Standard deviation over C, H, W, (B, 1, 1, 1)."""
    return x.flatten(1).std(dim=1).view(-1, *[1] * (x.dim() - 1))
