"""The step inside the backward pass: each tensor is stepped as soon as its gradient is there, and the gradient is freed.

Gradients then never exist all at once, which for SDXL's UNet is 4.8 GiB in bf16. The bits are those of a step after the pass, since
no update needs anything of another: so a clip by the norm of the whole gradient is out, and `Clipping` has what can be done instead.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from aquatint.optim.clipping import Clipping, is_finite, tensor_norms, whole_norm
from aquatint.optim.tensorwise import Tensorwise, Unit


class FusedBackward:
    """Steps a tensorwise optimizer from inside `backward`, between `arm` and `finish`; outside of them gradients add up as usual.

    A gradient that is not finite moves nothing of its unit, which is a large tensor or small neighbours; the others keep their steps.
    The host never asks the device about it. Raises ValueError for a clip by the norm of the whole gradient, which is not known in time.
    """

    def __init__(self, optimizer: Tensorwise, clipping: Clipping) -> None:
        if clipping.mode == "global" and clipping.max_norm > 0:
            raise ValueError("a step inside the backward pass cannot clip by the norm of the whole gradient")
        self.optimizer, self.clipping = optimizer, clipping
        self._units: list[Unit] = []
        self._unit_of: dict[Tensor, Unit] = {}
        self._missing: dict[int, int] = {}
        self._norms: dict[Tensor, Tensor] = {}
        self._finite_loss: Tensor | None = None
        params = [param for unit in optimizer.units() for param in unit.params if param.requires_grad]
        self._handles: list[RemovableHandle] = [
            param.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
            for param in params
        ]

    def arm(self, finite: Tensor) -> None:
        """The next backward pass brings the last part of each gradient. Learning rates must be set.

        `finite` is whether the loss is, a bool scalar: where it is False, no weight is moved.
        """
        self._units = self.optimizer.units()
        self._unit_of = {param: unit for unit in self._units for param in unit.params}
        self._missing = {unit.index: len(unit.params) for unit in self._units}
        self._norms, self._finite_loss = {}, finite

    def finish(self) -> tuple[Tensor, Tensor]:
        """Steps what the pass left over; returns the norm of the whole gradient before clipping, and whether it and the loss are finite."""
        assert self._finite_loss is not None, "not armed"
        for unit in self._units:
            if unit.index in self._missing:
                self._step(unit)
        norm = whole_norm([self._norms[param] for param in self._unit_of if param in self._norms])
        finite = self._finite_loss & is_finite(norm)
        self.clipping.remember(norm, finite)
        self._units, self._unit_of, self._missing, self._norms, self._finite_loss = [], {}, {}, {}, None
        return norm, finite

    def remove(self) -> None:
        """Take the hooks off the weights."""
        for handle in self._handles:
            handle.remove()

    def _arrived(self, param: Tensor) -> None:
        unit = self._unit_of.get(param)
        if unit is None:
            return
        self._missing[unit.index] -= 1
        if self._missing[unit.index] == 0:
            self._step(unit)

    @torch.no_grad()
    def _step(self, unit: Unit) -> None:
        del self._missing[unit.index]
        params = [param for param in unit.params if param.grad is not None]
        norms = tensor_norms(params)
        self._norms.update(zip(params, norms, strict=True))
        if norms and self._finite_loss is not None:
            finite = self._finite_loss & is_finite(norms[0] if len(norms) == 1 else whole_norm(norms))
            self.clipping.clip_(params, norms)
            self.optimizer.update(unit, finite)
        for param in params:
            param.grad = None
