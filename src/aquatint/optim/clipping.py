"""How the gradient is made smaller before a step: as a whole, each tensor on its own, or by the norm of the step before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from aquatint.optim.rounding import write_
from aquatint.optim.sharded import local_grad, whole_norms

Clip = Literal["global", "per_tensor", "delayed"]

TORCHS_EPS = 1e-6  # what torch's clip adds to a norm before it divides by it


def tensor_norms(params: Sequence[Tensor]) -> list[Tensor]:
    """The L2 norm of each gradient, accumulated in float32 whatever its dtype; of a sharded one, that of the whole."""
    params = [param for param in params if param.grad is not None]
    norms = torch._foreach_norm([local_grad(param) for param in params], dtype=torch.float32) if params else []
    return whole_norms(norms, params)


def whole_norm(norms: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all gradients together, from those of each."""
    whole: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)))
    return whole


def is_finite(number: Tensor) -> Tensor:
    """Whether a scalar is neither infinite nor NaN, as a bool scalar: in half as many operations as torch's."""
    return number.abs() < torch.inf


class Clipping:
    """A largest norm and what it is the norm of; 0 does not clip.

    `global` is that of the whole gradient. `per_tensor` allows each tensor as much, which is another algorithm: it changes the
    direction of the whole. `delayed` scales the whole gradient by what its norm was at the step before, which is known before
    the first tensor of a step is; `previous_norm` is that norm, 0 before the first step, which therefore is not clipped.
    """

    def __init__(self, mode: Clip, max_norm: float, *, device: torch.device | None = None) -> None:
        self.mode, self.max_norm = mode, max_norm
        self.previous_norm = torch.zeros((), dtype=torch.float32, device=device)

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold for the run to go on exactly."""
        return {"previous_norm": self.previous_norm} if self.mode == "delayed" else {}

    def clip_(self, params: Sequence[Tensor], norms: Sequence[Tensor], whole: Tensor | None = None) -> None:
        """Scale gradients in place. For `global` they must be all there are; otherwise any part may come alone.

        `whole` is the `whole_norm` of `norms`, if it is known already.
        """
        if self.max_norm == 0:
            return
        if self.mode == "per_tensor":
            for param, norm in zip(params, norms, strict=True):
                _shorten_([param], self.max_norm, norm)
        elif self.mode == "delayed":
            _shorten_(params, self.max_norm, self.previous_norm)
        else:
            _shorten_(params, self.max_norm, whole_norm(norms) if whole is None else whole)

    def remember(self, norm: Tensor, finite: Tensor | None = None) -> None:
        """Keep the norm of a step that was taken, for the next one; where the bool scalar `finite` is False, it was not."""
        if self.mode == "delayed":
            write_(self.previous_norm, norm, finite)


def _shorten_(params: Sequence[Tensor], max_norm: float, norm: Tensor) -> None:
    """As torch does it, but what is in main memory is not multiplied by 1."""
    if norm.device.type == "cpu" and (max_norm / (norm + TORCHS_EPS)).numpy() >= 1:
        return
    clip_grads_with_norm_(params, max_norm, norm)
