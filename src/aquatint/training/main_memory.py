"""Main memory: how much of it is free, and a copy of tensors in it that is written to disk while they change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

Tables = Mapping[str, Mapping[str, Tensor]]
SLAB_BYTES = 1 << 30
ALIGNMENT = 64  # bytes; a multiple of every dtype's size
GROUP_FILES = {  # where a control group says its limit, its use, and how much of that are files that the system can drop
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),  # version 2
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
}


def spare_bytes(root: Path = Path("/")) -> int | None:
    """Main memory that this process can take beyond what it needs itself; None where the system does not tell.

    It is what is available in the machine and in the control groups around the process, less what the process has held at some time
    beyond what it holds now: a step on a CPU gives its activations back, and wants as much again.
    """
    try:
        available = _kib_table(root / "proc/meminfo")["MemAvailable"]
        own = _kib_table(root / "proc/self/status")
    except FileNotFoundError:
        return None
    left = min([available, *_left_in_groups(root)])
    return max(0, left - (own["VmHWM"] - own["VmRSS"]))


def held_bytes(root: Path = Path("/")) -> int | None:
    """Main memory that this process has now; None where the system does not tell."""
    path = root / "proc/self/status"
    return _kib_table(path)["VmRSS"] if path.exists() else None


def _kib_table(path: Path) -> dict[str, int]:
    """Lines such as `MemAvailable:  1024 kB`, in bytes."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1:] == ["kB"]}


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each control group of the process, and each around it, leaves. A container may show only the innermost as its root."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controller, path = line.split(":", 2)
        if controller not in GROUP_FILES:
            continue
        folder, limit, use, droppable = GROUP_FILES[controller]
        group = Path(path.strip("/"))
        for inner in (group, *group.parents):
            with contextlib.suppress(FileNotFoundError):
                here = root / folder / inner
                text = (here / limit).read_text().strip()
                rows = (row.split() for row in (here / "memory.stat").read_text().splitlines())
                dropped = sum(int(row[1]) for row in rows if row[0] == droppable)
                if text != "max":
                    yield max(0, int(text) - int((here / use).read_text()) + dropped)


class Copy:
    """Tables of tensors as they were at one time. Its memory is kept for the next time: fresh memory takes six times as long to fill."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[str, Tensor]] = {}

    def tables(self) -> Tables:
        return self._tables

    def missing_bytes(self, tables: Tables) -> int:
        """What a copy of these would take beyond the memory that there is already."""
        return sum(tensor.nbytes for file, name, tensor in _entries(tables) if not self._fits(file, name, tensor))

    def make_room(self, tables: Tables) -> None:
        """Takes the memory for a copy of these, pinned if one of them is on a GPU. Raises RuntimeError if the system does not give it."""
        missing = [(file, name, tensor) for file, name, tensor in _entries(tables) if not self._fits(file, name, tensor)]
        pinned = any(tensor.is_cuda for _, _, tensor in _entries(tables))
        fresh = places([tensor for _, _, tensor in missing], pinned=pinned)
        found = {(file, name): place for (file, name, _), place in zip(missing, fresh, strict=True)}
        self._tables = {
            file: {name: found[file, name] if (file, name) in found else self._tables[file][name] for name in table}
            for file, table in tables.items()
        }

    @torch.no_grad()
    def take(self, tables: Tables) -> None:
        """Copies all tensors; `make_room` was called with the same. When it returns, they may change."""
        for file, name, tensor in _entries(tables):
            self._tables[file][name].copy_(tensor, non_blocking=True)
        for device in {tensor.device for _, _, tensor in _entries(tables) if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()

    def _fits(self, file: str, name: str, tensor: Tensor) -> bool:
        place = self._tables.get(file, {}).get(name)
        return place is not None and place.shape == tensor.shape and place.dtype == tensor.dtype


def _entries(tables: Tables) -> Iterator[tuple[str, str, Tensor]]:
    for file, table in tables.items():
        for name, tensor in table.items():
            yield file, name, tensor


def places(tensors: Sequence[Tensor], *, pinned: bool) -> list[Tensor]:
    """Memory for a contiguous tensor like each of these, not filled, in few large pieces.

    The sizes of the pieces are powers of two, to which torch rounds up all pinned memory: tensor by tensor, a third would go to waste.
    """
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    slab, used, left, found = torch.empty(0, dtype=torch.uint8), 0, sum(sizes), []
    for tensor, size in zip(tensors, sizes, strict=True):
        if used + size > len(slab):
            wanted = max(1 << (min(left, SLAB_BYTES).bit_length() - 1), 1 << (size - 1).bit_length())
            slab, used = torch.empty(wanted, dtype=torch.uint8, pin_memory=pinned), 0
        found.append(slab[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        used, left = used + size, left - size
    return found
