"""Weights that are shared out by rows: each process holds some neighbours of dimension 0 (FSDP2, or `distribute_tensor` over any mesh).

Random bits, blocks and means are those of the whole tensor, so that weights do not depend on how many processes there are. An optimizer
steps the part that a process holds, or, where parts need each other, each process puts the whole together, steps it and keeps its own part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from aquatint.errors import UsageError

if TYPE_CHECKING:  # to import it takes half a second, which who has no such tensors need not wait for
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Place:
    """Where the part of a weight that a process holds lies in the whole, which has this `shape`.

    `start` is the number of elements before it. All parts but the last ones have `most` elements. `group` are the processes that hold
    the others, `parts` of them; none if the part is the whole.
    """

    shape: torch.Size
    start: int
    most: int
    parts: int = 1
    group: ProcessGroup | None = None

    @property
    def is_everywhere(self) -> bool:
        """Whether no process's part is empty."""
        return self.most * (self.parts - 1) < self.shape.numel()

    def total(self, of_part: Tensor) -> Tensor:
        """A sum over the whole from that over each part; written into its argument."""
        if self.group is not None:
            torch.distributed.all_reduce(of_part, group=self.group)
        return of_part


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is torch's DTensor."""
    return hasattr(tensor, "device_mesh")


def place_of(weight: Tensor) -> Place:
    """Where this process's part of a weight lies; of a plain tensor it is the whole.

    Raises UsageError for a weight that is shared out otherwise than by rows.
    """
    whole = Place(weight.shape, 0, weight.numel())
    if not is_dtensor(weight):
        return whole
    from torch.distributed.tensor import Shard

    dims = [dim for dim, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if not dims:
        return whole
    if len(dims) > 1 or type(weight.placements[dims[0]]) is not Shard or not weight.placements[dims[0]].is_shard(0):
        raise UsageError(
            f"no optimizer can step a weight of shape {tuple(weight.shape)} that is placed as {weight.placements}",
            hint="share weights out along dimension 0 and one dimension of the mesh: `fully_shard(model)` does, or `[Shard(0)]`",
        )
    parts, rank = weight.device_mesh.size(dims[0]), weight.device_mesh.get_local_rank(dims[0])
    rows, width = -(-weight.shape[0] // parts), math.prod(weight.shape[1:])  # as torch.chunk does it
    start = min(rank * rows, weight.shape[0]) * width
    return Place(weight.shape, start, rows * width, parts, weight.device_mesh.get_group(dims[0]))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, the same memory; a plain one is its own."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_grad(weight: Tensor) -> Tensor:
    """The part of a weight's gradient that belongs to this process's part of the weight."""
    grad = weight.grad
    assert grad is not None, "a weight without a gradient is not stepped"
    if is_dtensor(grad) and is_dtensor(weight):
        return grad.redistribute(weight.device_mesh, weight.placements).to_local()
    return grad


def whole_norms(of_parts: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Norms of what belongs to weights, from those of this process's parts: one sum for all of them over each group of processes."""
    norms = list(of_parts)
    shared: dict[ProcessGroup, list[int]] = {}
    for index, weight in enumerate(weights):
        if is_dtensor(weight) and (group := place_of(weight).group) is not None:
            shared.setdefault(group, []).append(index)
    for group, indices in shared.items():
        squares = torch.stack([norms[index] for index in indices]).square()
        torch.distributed.all_reduce(squares, group=group)
        for index, norm in zip(indices, squares.sqrt(), strict=True):
            norms[index] = norm
    return norms


@contextmanager
def gathered(
    weights: Sequence[Tensor], states: MutableMapping[Tensor, Any], steps_part: Callable[[Tensor], bool]
) -> Iterator[list[Tensor]]:
    """Weights to step: themselves, or, where a part cannot be stepped on its own, a whole with its gradient and the state of the weight.

    What is done to a whole inside of the block is done to this process's part of the weight at its end.
    """
    tensors = [weight if not is_dtensor(weight) or steps_part(weight) else _whole(weight) for weight in weights]
    wholes = [(weight, tensor, place_of(weight).start) for weight, tensor in zip(weights, tensors, strict=True) if tensor is not weight]
    for weight, tensor, _ in wholes:
        states[tensor] = states[weight]
    yield tensors
    for weight, tensor, start in wholes:
        del states[tensor]
        part = local(weight)
        part.copy_(tensor.flatten()[start : start + part.numel()].view(part.shape))


def _whole(weight: DTensor) -> Tensor:
    tensor = weight.full_tensor()
    assert weight.grad is not None, "a weight without a gradient is not stepped"
    tensor.grad = weight.grad.full_tensor()  # type: ignore[attr-defined]
    return tensor
