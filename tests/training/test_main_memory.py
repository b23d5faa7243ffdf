from itertools import pairwise
from pathlib import Path

import pytest
import torch

from aquatint.training.main_memory import ALIGNMENT, SLAB_BYTES, Copy, places, spare_bytes

KIB = 1024


def machine(root: Path, files: dict[str, str]) -> Path:
    """A system that says so of itself: 100 MiB available, 30 MiB held by this process, 50 MiB once."""
    told = {
        "proc/meminfo": "MemTotal: 999999 kB\nMemAvailable: 102400 kB\nHugePages_Total: 0\n",
        "proc/self/status": "Name:\tpython\nVmHWM:\t51200 kB\nVmRSS:\t30720 kB\nThreads:\t3\n",
        "proc/self/cgroup": "0::/\n",
        **files,
    }
    for name, text in told.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder: str, limit: str, use_kib: int, files_kib: int, *, version: int = 2) -> dict[str, str]:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    prefix = "" if version == 2 else "total_"
    stat = f"anon 5\n{prefix}inactive_file {files_kib * KIB}\n"
    return {f"{folder}/{names[0]}": limit, f"{folder}/{names[1]}": f"{use_kib * KIB}\n", f"{folder}/memory.stat": stat}


def test_what_a_step_has_given_back_is_not_spare(tmp_path: Path):
    assert spare_bytes(machine(tmp_path, {})) == (100 - (50 - 30)) * KIB * KIB


@pytest.mark.parametrize(
    ("files", "left_kib"),
    [
        (group("sys/fs/cgroup", "max\n", 1, 0), 102400),
        (group("sys/fs/cgroup", f"{90000 * KIB}\n", 50000, 10000), 50000),
        ({"proc/self/cgroup": "0::/a/b\n", **group("sys/fs/cgroup/a", f"{60000 * KIB}", 20000, 0)}, 40000),
        (
            {
                "proc/self/cgroup": "5:memory:/docker/1\n1:cpu:/\n0::/\n",
                **group("sys/fs/cgroup/memory", f"{70000 * KIB}", 30000, 1000, version=1),
            },
            41000,
        ),
    ],
    ids=["no limit", "version 2", "a group around it", "version 1, seen from inside"],
)
def test_a_container_has_less_than_the_machine(tmp_path: Path, files: dict[str, str], left_kib: int):
    assert spare_bytes(machine(tmp_path, files)) == (left_kib - 20480) * KIB


def test_a_system_that_does_not_tell_is_not_guessed_at(tmp_path: Path):
    assert spare_bytes(tmp_path) is None


def test_this_machine_has_some_and_less_than_all():
    spare = spare_bytes()
    assert spare is not None
    assert 0 <= spare < 1 << 50


def tables() -> dict[str, dict[str, torch.Tensor]]:
    drawn = torch.Generator().manual_seed(0)
    return {
        "unet": {"a": torch.randn(3, 5, generator=drawn), "b": torch.randn(4, 2, generator=drawn).to(torch.bfloat16).t()},
        "optimizer": {"a/step": torch.tensor(7.0), "a/code": torch.arange(5, dtype=torch.uint8), "empty": torch.empty(0, 3)},
    }


def test_a_copy_is_what_the_tensors_were_and_stays_so():
    now, expected, copy = tables(), tables(), Copy()
    copy.make_room(now)
    copy.take(now)
    for table in now.values():
        for tensor in table.values():
            tensor.zero_()
    found = copy.tables()
    assert {file: list(table) for file, table in found.items()} == {file: list(table) for file, table in expected.items()}
    for file, table in expected.items():
        assert all(torch.equal(found[file][name], value) and found[file][name].dtype == value.dtype for name, value in table.items())
        assert all(tensor.is_contiguous() for tensor in found[file].values())


def test_its_memory_is_taken_once_and_more_of_it_only_for_what_is_new():
    now, copy = tables(), Copy()
    assert copy.missing_bytes(now) == sum(tensor.nbytes for table in now.values() for tensor in table.values())
    copy.make_room(now)
    assert copy.missing_bytes(now) == 0
    before = copy.tables()["unet"]["a"].data_ptr()
    later = {"unet": {"a": now["unet"]["a"], "b": torch.ones(6)}, "loss": {"c": torch.ones(2, dtype=torch.float64)}}
    assert copy.missing_bytes(later) == 6 * 4 + 2 * 8
    copy.make_room(later)
    copy.take(later)
    assert copy.tables()["unet"]["a"].data_ptr() == before
    assert {file: set(table) for file, table in copy.tables().items()} == {"unet": {"a", "b"}, "loss": {"c"}}
    assert copy.tables()["unet"]["b"].tolist() == [1.0] * 6


def test_places_lie_apart_in_few_pieces_of_sizes_that_are_not_rounded_up():
    tensors = [torch.empty(n, dtype=dtype, device="meta") for n in range(1, 9999, 99) for dtype in (torch.uint8, torch.float32)]
    found = places(tensors, pinned=False)
    spans = sorted((place.data_ptr(), place.data_ptr() + place.nbytes) for place in found)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(place.storage_offset() * place.element_size() % ALIGNMENT == 0 for place in found)
    pieces = {place.untyped_storage().data_ptr(): place.untyped_storage().nbytes() for place in found}
    assert all(size & (size - 1) == 0 and size <= SLAB_BYTES for size in pieces.values())
    assert sum(pieces.values()) <= 1.1 * sum(tensor.nbytes for tensor in tensors)
