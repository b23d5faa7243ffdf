"""Tensors one behind the other in one piece of memory, so that all of them are moved by one copy; and main memory to keep them in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from aquatint.errors import full_memory
from aquatint.optim.sizes import packed_bytes

SLAB_BYTES = 1 << 30


@dataclass(frozen=True)
class Layout:
    """Dtype, shape and strides of tensors that are packed, in their order. Each fills its memory, in whatever order of dimensions."""

    members: tuple[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]], ...]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Layout:
        return Layout(tuple((tensor.dtype, tuple(tensor.shape), tensor.stride()) for tensor in tensors))

    @property
    def num_bytes(self) -> int:
        return packed_bytes(dtype.itemsize * prod(shape) for dtype, shape, _ in self.members)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors in a uint8 vector that they are packed in, or are to be."""
        found, start = [], 0
        for dtype, shape, strides in self.members:
            size = dtype.itemsize * prod(shape)
            found.append(flat[start : start + size].view(dtype).as_strided(shape, strides))
            start += packed_bytes([size])
        return found


class Arena:
    """Main memory in slabs, for vectors that are never given back.

    torch rounds the size of pinned memory up to a power of two, and so one slab for many wastes least. Each is as large as all before
    it, up to `slab_bytes`, which are too many for the little that an adapter's optimizer keeps.
    """

    def __init__(self, *, pinned: bool, slab_bytes: int = SLAB_BYTES) -> None:
        self.pinned, self.slab_bytes = pinned, slab_bytes
        self._slabs: list[tuple[Tensor, int]] = []  # with how much of each is taken

    def take(self, num_bytes: int) -> Tensor:
        """A uint8 vector, not filled, in the first slab with room for it. Raises MemoryError if the system gives none."""
        room = packed_bytes([num_bytes])
        for index, (slab, used) in enumerate(self._slabs):
            if used + room <= len(slab):
                self._slabs[index] = slab, used + room
                return slab[used : used + num_bytes]
        size = max(room, min(self.slab_bytes, sum(len(slab) for slab, _ in self._slabs)))
        slab = self._slab(1 << (size - 1).bit_length())
        self._slabs.append((slab, room))
        return slab[:num_bytes]

    def _slab(self, num_bytes: int) -> Tensor:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.pinned)
        except RuntimeError as error:
            if full_memory(error) is None:
                raise
            raise MemoryError(f"no main memory for another {num_bytes:,} bytes") from error  # pinned, which CUDA does not call main memory
