"""Several small tensors as one: of SDXL's 1,680, 886 are vectors that hold 0.06 % of the weights and take half of the kernel launches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from aquatint.optim.rounding import copy_stochastic_


def batches(tensors: Iterable[Tensor], kind: Callable[[Tensor], Hashable], max_elements: int) -> Iterator[list[Tensor]]:
    """Neighbours of one kind, together at most `max_elements` large; a larger tensor goes alone."""
    batch: list[Tensor] = []
    room = max_elements
    for tensor in tensors:
        room -= tensor.numel()
        if batch and (room < 0 or kind(tensor) != kind(batch[0])):
            yield batch
            batch, room = [], max_elements - tensor.numel()
        batch.append(tensor)
    if batch:
        yield batch


def join(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor with the elements of all; a single one is returned as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.flatten() for tensor in tensors])


def write_(targets: Sequence[Tensor], joined: Tensor, generator: torch.Generator) -> None:
    """Write a float32 result of joined tensors back into them, rounding as `copy_stochastic_` does."""
    if len(targets) == 1:
        return copy_stochastic_(targets[0], joined, generator)
    rounded = torch.empty_like(joined, dtype=targets[0].dtype)
    copy_stochastic_(rounded, joined, generator)
    for target, piece in zip(targets, torch.split(rounded, [target.numel() for target in targets]), strict=True):
        target.copy_(piece.view(target.shape))
    return None
