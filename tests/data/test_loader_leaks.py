"""Two hundred tiny epochs, each with workers of its own: nothing grows."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from aquatint.data.loader import stream
from tests.data.test_loader import fill, reader_of

EPOCHS, WARM_UP, BATCHES = 200, 40, 3

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


@pytest.mark.long
def test_memory_files_and_shared_memory_do_not_grow(tmp_path):
    entries = fill(tmp_path)
    reader = reader_of(replace(entries))
    shared, files, memory = shared_memory(), 0, 0
    for epoch in range(EPOCHS):
        workers = 2 if epoch % 20 == 0 else epoch % 2
        batches = list(stream(reader, BATCHES * epoch, BATCHES * (epoch + 1), workers=workers, prefetch=2, pin=False))
        assert len(batches) == BATCHES
        del batches
        if epoch == WARM_UP:
            files, memory = open_files(), resident_bytes()
    assert open_files() <= files
    assert shared_memory() - shared == set() or all("torch" not in name for name in shared_memory() - shared)
    assert resident_bytes() - memory < 12 << 20, "allocators keep a few pages; a leak of one batch per epoch would be more"
