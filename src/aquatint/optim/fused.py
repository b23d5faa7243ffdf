"""The step inside the backward pass: each tensor is stepped as soon as its gradient is there, and the gradient is freed.

Gradients then never exist all at once, which for SDXL's UNet is 4.8 GiB in bf16. The bits are those of a step after the pass, since
no update needs anything of another: so a clip by the norm of the whole gradient is out, and `Clipping` has what can be done instead.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from aquatint.optim.clipping import Clipping, tensor_norms, whole_norm
from aquatint.optim.tensorwise import Tensorwise, Unit


class FusedBackward:
    """Steps a tensorwise optimizer from inside `backward`, between `arm` and `finish`; outside of them gradients add up as usual.

    A gradient that is not finite moves nothing, but tensors that were stepped before it was seen keep their step.
    Raises ValueError for a clip by the norm of the whole gradient, which is not known in time.
    """

    def __init__(self, optimizer: Tensorwise, clipping: Clipping) -> None:
        if clipping.mode == "global" and clipping.max_norm > 0:
            raise ValueError("a step inside the backward pass cannot clip by the norm of the whole gradient")
        self.optimizer, self.clipping = optimizer, clipping
        self._units: list[Unit] = []
        self._unit_of: dict[Tensor, Unit] = {}
        self._missing: dict[int, int] = {}
        self._norms: dict[Tensor, Tensor] = {}
        self._finite = True
        params = [param for unit in optimizer.units() for param in unit.params if param.requires_grad]
        self._handles: list[RemovableHandle] = [
            param.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
            for param in params
        ]

    def arm(self) -> None:
        """The next backward pass brings the last part of each gradient. Learning rates must be set."""
        self._units = self.optimizer.units()
        self._unit_of = {param: unit for unit in self._units for param in unit.params}
        self._missing = {unit.index: len(unit.params) for unit in self._units}
        self._norms, self._finite = {}, True

    def finish(self) -> tuple[Tensor, bool]:
        """Steps what the pass left over; returns the norm of the whole gradient before clipping, and whether all of it was finite."""
        for unit in self._units:
            if unit.index in self._missing:
                self._step(unit)
        norm = whole_norm([self._norms[param] for param in self._unit_of if param in self._norms])
        finite = self._finite and bool(norm.isfinite())
        if finite:
            self.clipping.remember(norm)
        self._units, self._unit_of, self._missing, self._norms = [], {}, {}, {}
        return norm, finite

    @property
    def armed(self) -> bool:
        """Whether a backward pass steps, or has stepped and `finish` is due."""
        return bool(self._units)

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
        finite = torch.stack(norms).isfinite().tolist() if norms else []  # a GPU has to be waited for here: the price of leaving one out
        for param, is_finite in zip(params, finite, strict=True):
            if not is_finite:
                param.grad = None
        self._finite = self._finite and all(finite)
        kept = [(param, norm) for param, norm, is_finite in zip(params, norms, finite, strict=True) if is_finite]
        if kept:
            self.clipping.clip_([param for param, _ in kept], [norm for _, norm in kept])
            self.optimizer.update(unit)
        for param in params:
            param.grad = None
