from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would ask the network fails at once
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes of two threads each wait for one another most of the time


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with random weights: SDXL's topology at a thousandth of its size, in one official-layout file."""
    from aquatint.demo.model import write_tiny_base

    path = tmp_path_factory.mktemp("base") / "tiny.safetensors"
    write_tiny_base(path, seed=0)
    return path
