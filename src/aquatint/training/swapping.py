"""Frozen blocks whose weights live in main memory: two of them are on the device at a time, the one in use and the one that comes next.

Layers ask for their weight in the forward pass and again in the backward pass (see `models.frozen`), and so nothing here depends on whether
activations are recomputed. Which block comes next follows from the direction: up in the forward pass, down in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aquatint.models.frozen import FrozenLinear, Parts
from aquatint.optim.packed import SLAB_BYTES, Arena, Layout

ORDER = ("down_blocks", "mid_block", "up_blocks")  # of a UNet's forward pass


class Swapper:
    """Takes the weights of blocks into main memory, and brings each to the device when one of its layers asks for it.

    `blocks` are in the order of the forward pass. Another order costs time and nothing else.
    """

    def __init__(self, blocks: Iterable[Sequence[FrozenLinear]], device: torch.device, *, slab_bytes: int = SLAB_BYTES) -> None:
        self.device = device
        self.num_loads = 0
        self._stored: list[Tensor] = []
        self._layouts: list[tuple[Layout, list[int]]] = []  # of each block, with how many tensors each of its layers has
        arena = Arena(pinned=device.type == "cuda", slab_bytes=slab_bytes)
        for block in blocks:
            self._take(block, arena)
        largest = max(map(len, self._stored))
        self._rooms = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in self._stored[:2]]
        self._room_of: dict[int, int] = {}
        self._parts: dict[int, list[Parts]] = {}  # of each layer, of the blocks that are in a room
        self._arrival: dict[int, torch.cuda.Event] = {}
        self._current: int | None = None
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def device_bytes(self) -> int:
        """What the two blocks take on the device."""
        return sum(room.nbytes for room in self._rooms)

    def fetch(self, block: int, layer: int) -> Parts:
        """What a layer's weight is kept as, on the device, to be used at once: what is asked for next may take its place."""
        if block != self._current:
            self._enter(block)
        return self._parts[block][layer]

    def _take(self, block: Sequence[FrozenLinear], arena: Arena) -> None:
        tensors = [part for layer in block for part in layer.parts]
        index, layout = len(self._stored), Layout.of(tensors)
        flat = arena.take(layout.num_bytes)
        for view, tensor in zip(layout.views(flat), tensors, strict=True):
            view.copy_(tensor)
        self._layouts.append((layout, [len(layer.parts) for layer in block]))
        self._stored.append(flat)
        for number, layer in enumerate(block):
            layer.lend(partial(self.fetch, index, number))

    def _enter(self, block: int) -> None:
        """Makes a block the one in use, and begins to bring what comes after it."""
        if block not in self._room_of:
            self._load(block)
        if block in self._arrival:
            torch.cuda.current_stream(self.device).wait_event(self._arrival.pop(block))
        previous, self._current = self._current, block
        following = self._following(previous, block)
        if following is not None and following not in self._room_of:
            self._load(following)

    def _following(self, previous: int | None, block: int) -> int | None:
        """The next block in this direction; at an end, the pass turns back."""
        step = -1 if previous is not None and block < previous else 1
        return next((index for index in (block + step, block - step) if 0 <= index < len(self._stored)), None)

    def _load(self, block: int) -> None:
        """Begins to bring a block into the room that is not in use, after all that was asked of the device so far."""
        room = 1 - self._room_of[self._current] if self._current is not None else 0
        for evicted in [index for index, taken in self._room_of.items() if taken == room]:
            del self._room_of[evicted], self._parts[evicted]
            self._arrival.pop(evicted, None)
        flat, (layout, counts) = self._rooms[room][: len(self._stored[block])], self._layouts[block]
        if self._side is None:
            flat.copy_(self._stored[block])
        else:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._side):
                flat.copy_(self._stored[block], non_blocking=True)
                self._arrival[block] = self._side.record_event()
        views = iter(layout.views(flat))
        self._room_of[block], self._parts[block] = room, [tuple(next(views) for _ in range(count)) for count in counts]
        self.num_loads += 1


def in_forward_order(blocks: Iterable[str]) -> list[str]:
    """Names of blocks as a UNet's forward pass comes to them. Its modules have the middle at the end."""
    return sorted(blocks, key=lambda name: ORDER.index(name.partition(".")[0]))


def swap_blocks(unet: Any, blocks: Mapping[str, Sequence[str]], device: torch.device) -> Swapper:
    """Moves the weights of blocks, given with their layers in the order of the modules, to main memory; all layers are frozen ones."""
    return Swapper(([unet.get_submodule(layer) for layer in blocks[name]] for name in in_forward_order(blocks)), device)
