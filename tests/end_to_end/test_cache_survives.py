"""Whatever becomes of those who build a cache, it ends up the same, byte for byte, and finished work is never done again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from aquatint.data.shards import ShardStore
from tests.data.toys import ToyEncoder, build, encoded_rows, files_of
from tests.end_to_end.killed_builds import KILLS, SETTINGS, SHARD_ENTRIES, requests_in

ROOT = Path(__file__).parents[2]
IN_FLIGHT = 4 * SHARD_ENTRIES  # of one builder: the shard in the encoder, two being written, and one that is written but not known to be


@pytest.fixture
def clean(tmp_path: Path) -> tuple[list[Any], dict[str, bytes]]:
    """Requests, and the shards of a build that nobody disturbed."""
    requests = requests_in(tmp_path)
    build(ShardStore(tmp_path / "clean"), requests, ToyEncoder, **SETTINGS)
    return requests, files_of(tmp_path / "clean")


def run(mode: str, folder: Path) -> list[dict[str, Any]]:
    """What the program prints, after a look at what it leaves behind."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(Path(__file__).with_name("killed_builds.py")), mode, str(folder)]
    with tempfile.TemporaryDirectory(prefix="ray-") as short:  # names of sockets have a limit
        settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "RAY_TMPDIR": short}
        program = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | settings, cwd=ROOT, start_new_session=True
        )
        try:
            printed, complaints = program.communicate(timeout=120)
        finally:
            left = ended_session(program.pid)
    assert program.returncode == 0, complaints
    assert left == []
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def ended_session(session: int) -> list[int]:
    """Gives the processes of a session a few seconds to end, and kills and returns those that do not."""
    for _ in range(50):
        left = [number for number in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_in(number, session)]  # noqa: PTH208
        if not left:
            return []
        time.sleep(0.1)
    for number in left:
        os.kill(number, signal.SIGKILL)
    return left


def is_in(process: int, session: int) -> bool:
    try:
        return os.getsid(process) == session
    except OSError:
        return False


def test_builders_that_are_killed_lose_no_finished_shard_and_change_no_byte(
    tmp_path: Path, clean: tuple[list[Any], dict[str, bytes]]
) -> None:
    requests, shards = clean
    rounds = run("kill", tmp_path)
    assert sum(one["killed"] for one in rounds) == KILLS
    halfway = 0
    for one in rounds:
        store = ShardStore(tmp_path / f"round-{one['round']}")
        before, encoder = len(store), ToyEncoder()
        halfway += before < len(requests)
        assert files_of(store.folder).items() <= shards.items()
        build(store, requests, lambda encoder=encoder: encoder, **SETTINGS)
        assert sum(batch[0] for batch in encoder.batches) == len(requests) - before  # only what was missing
        assert encoded_rows(tmp_path / f"round-{one['round']}.log") <= before + (one["killed"] + 1) * IN_FLIGHT
        assert files_of(store.folder) == shards
        assert list((store.folder / "claims").iterdir()) == []
    assert len(rounds) > 1 or halfway


def test_builders_of_one_cache_share_the_work_and_take_over_that_of_the_dead(
    tmp_path: Path, clean: tuple[list[Any], dict[str, bytes]]
) -> None:
    requests, shards = clean
    together, bereaved = run("share", tmp_path)
    assert together["ends"] == [0, 0]
    assert encoded_rows(tmp_path / "round-0.log") == len(requests)  # nothing twice
    assert files_of(tmp_path / "round-0") == shards
    assert bereaved["ends"] == [-9, 0, 0]
    assert len(requests) <= encoded_rows(tmp_path / "round-1.log") <= len(requests) + IN_FLIGHT
    assert files_of(tmp_path / "round-1") == shards


@pytest.mark.long
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_ray_workers_make_the_same_shards_when_one_dies(tmp_path: Path, clean: tuple[list[Any], dict[str, bytes]]) -> None:
    requests, shards = clean
    assert run("ray", tmp_path) == [{"round": 0, "failures": 0}]
    assert (tmp_path / "round-0.died").exists()
    assert files_of(tmp_path / "round-0") == shards
    assert encoded_rows(tmp_path / "round-0.log") <= len(requests) + SHARD_ENTRIES
