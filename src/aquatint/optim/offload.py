"""Optimizer state in main memory: that of some weights is on the device while they are stepped, and nothing of it in between.

The update itself is the same and sees the same numbers, so its bits are those of a step with everything on the device. On a GPU, the state
of the weights that come next is brought in on a stream of its own while a step is made, and that of the last ones is sent back there. What
comes next is what came next in the step before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aquatint.optim.packed import SLAB_BYTES, Arena, Layout

COUNT = "step"  # a number for the host, or for a kernel, which stays where it is
States = Mapping[Tensor, MutableMapping[str, Any]]
Entries = dict[tuple[Tensor, str], Tensor]
Arrival = tuple[int, "torch.cuda.Event | None"]  # a room, and when what was asked for is in it


@dataclass(frozen=True)
class Box:
    """The state of a unit, packed in main memory. `tensors` are its views, by weight and name."""

    layout: Layout
    flat: Tensor
    tensors: Entries


class MainMemory:
    """Where the optimizer's state is between steps. `device` is that of the weights."""

    def __init__(self, device: torch.device, *, slab_bytes: int = SLAB_BYTES) -> None:
        self.device = device
        self._arena = Arena(pinned=device.type == "cuda", slab_bytes=slab_bytes)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._boxes: dict[int, Box] = {}
        self._rooms = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(2)]
        self._brought: dict[int, Arrival] = {}  # at most one unit that is ahead
        self._after: dict[int, int] = {}
        self._last: int | None = None
        self._room = 0  # that of the last unit

    @property
    def device_bytes(self) -> int:
        """What this takes on the device."""
        return sum(room.nbytes for room in self._rooms)

    @contextlib.contextmanager
    def held(self, index: int, params: Sequence[Tensor], states: States) -> Iterator[None]:
        """The state of a unit, by its index and its weights, is on the device inside the block."""
        box, there, ahead = self._boxes.get(index), entries(params, states), self._brought.pop(index, None)
        is_known = box is not None and same(there, box.tensors)
        lent = self._bring(box, ahead) if box is not None and is_known else {}
        put(states, lent or {key: value.to(self.device) for key, value in there.items()})
        self._look_ahead(index)
        yield
        self._send_back(index, params, states, lent)

    def settle(self) -> None:
        """Waits until all state is in main memory. Whoever looks at it there calls this before."""
        if self._side is not None:
            self._side.synchronize()
            torch.cuda.current_stream(self.device).synchronize()

    def _bring(self, box: Box, ahead: Arrival | None) -> Entries:
        """The state of a unit in a room on the device, which it may be in already."""
        self._brought.clear()
        room, event = ahead or self._load(box, 1 - self._room)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        self._room = room
        return dict(zip(box.tensors, box.layout.views(self._rooms[room]), strict=True))

    def _look_ahead(self, index: int) -> None:
        """Brings what came after this unit in the step before into the other room."""
        if self._last is not None:
            self._after[self._last] = index
        self._last, following = index, self._after.get(index, index)
        if following != index and following in self._boxes:
            self._brought = {following: self._load(self._boxes[following], 1 - self._room)}

    def _load(self, box: Box, room: int) -> Arrival:
        """Begins to fill a room, once the device is through with what was in it."""
        if len(self._rooms[room]) < len(box.flat):
            self.settle()
            self._rooms[room] = torch.empty(len(box.flat), dtype=torch.uint8, device=self.device)
        with self._aside():
            self._rooms[room][: len(box.flat)].copy_(box.flat, non_blocking=True)
            return room, self._side.record_event() if self._side is not None else None

    def _send_back(self, index: int, params: Sequence[Tensor], states: States, lent: Entries) -> None:
        """Brings a unit's state to main memory, in one piece if it is where it was lent, and puts it in place of that on the device."""
        there = entries(params, states)
        box = self._box(index, there)
        with self._aside():
            if lent and same(there, lent):
                box.flat.copy_(self._rooms[self._room][: len(box.flat)], non_blocking=True)
            else:
                for key, value in there.items():
                    box.tensors[key].copy_(value, non_blocking=True)
                    if value.is_cuda:
                        value.record_stream(torch.cuda.current_stream(self.device))
        put(states, box.tensors)

    def _box(self, index: int, there: Entries) -> Box:
        """The box of a unit. It is a new one for state that is new, or of other shapes; for other weights, the memory is kept."""
        layout, box = Layout.of(list(there.values())), self._boxes.get(index)
        if box is None or box.layout != layout or box.tensors.keys() != there.keys():
            flat = box.flat if box is not None and box.layout == layout else self._arena.take(layout.num_bytes)
            box = self._boxes[index] = Box(layout, flat, dict(zip(there, layout.views(flat), strict=True)))
        return box

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """On the side stream, after all that was asked of the device so far."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            yield


def entries(params: Sequence[Tensor], states: States) -> Entries:
    """The state of weights but for the counts, in a fixed order."""
    return {(param, name): value for param in params for name, value in states.get(param, {}).items() if name != COUNT}


def same(one: Entries, other: Entries) -> bool:
    """Whether both have the very same tensors."""
    return one.keys() == other.keys() and all(value is other[key] for key, value in one.items())


def put(states: States, tensors: Entries) -> None:
    """Puts tensors into the state, each in its place."""
    for (param, name), value in tensors.items():
        states[param][name] = value


def held(keeper: MainMemory | None, index: int, params: Sequence[Tensor], states: States) -> contextlib.AbstractContextManager[None]:
    """`MainMemory.held`, or nothing to do for a state that lives beside its weights."""
    return contextlib.nullcontext() if keeper is None else keeper.held(index, params, states)


def settle(optimizer: Any) -> None:
    """Waits until the state of an optimizer can be looked at where it is."""
    keeper: MainMemory | None = getattr(optimizer, "keeper", None)  # torch's own optimizers have none
    if keeper is not None:
        keeper.settle()
