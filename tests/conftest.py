from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would ask the network fails at once
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes of two threads each wait for one another most of the time


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keeps the million objects of modules and collected tests, which live to the end, out of every later look for garbage."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extensions complain of what is never collected


@pytest.fixture(autouse=True, scope="session")
def files_that_need_not_outlive_a_power_cut() -> Iterator[None]:
    """No test could tell whether a file was synced, and it is slow. Whether syncing is asked for is seen in tests of `storage`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with random weights: SDXL's topology at a thousandth of its size, in one official-layout file."""
    from aquatint.demo.model import write_tiny_base

    path = tmp_path_factory.mktemp("base") / "tiny.safetensors"
    write_tiny_base(path, seed=0)
    return path
