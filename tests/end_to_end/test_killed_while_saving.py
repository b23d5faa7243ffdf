"""A run that saves while it goes on, is killed in the middle of that and resumed, equals one that waits for its saves: bit for bit."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aquatint.config.schema import Config, dump
from aquatint.training.build import train_run
from tests.runs import small_config


def config_of(folder: Path, base: Path, name: str, *, background: bool) -> Config:
    return small_config(
        folder, base, run={"name": name}, training={"length": "3 steps"}, validation={"every": None},
        checkpoints={"every": "1 step", "keep": 9, "background": background},
        ema={"decay": 0.9, "power_stds": [0.05], "snapshot_every": "1 step"},
    )  # fmt: skip


@pytest.mark.long
def test_a_save_that_was_cut_off_is_as_if_it_had_not_begun(tmp_path: Path, tiny_base: Path):
    waiting, meanwhile = (config_of(tmp_path, tiny_base, name, background=name == "meanwhile") for name in ("waiting", "meanwhile"))
    straight = train_run(waiting).folder
    path = tmp_path / "meanwhile.json"
    path.write_text(json.dumps(dump(meanwhile)))
    killed = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_while_saving.py")), str(path), "2"], capture_output=True, timeout=100
    )
    assert killed.returncode == -signal.SIGKILL
    folder = straight.with_name("meanwhile")
    names = sorted(entry.name for entry in (folder / "checkpoints").iterdir())
    assert [name.partition(".tmp-")[0] for name in names] == ["step-000001", "step-000002"]
    assert not (folder / "checkpoints" / "step-000002").exists()
    assert train_run(meanwhile).folder == folder
    files = [path.relative_to(straight) for part in ("checkpoints", "ema") for path in sorted((straight / part).rglob("*.*"))]
    assert len(files) == 3 * 6 + 3
    assert files == [path.relative_to(folder) for part in ("checkpoints", "ema") for path in sorted((folder / part).rglob("*.*"))]
    for file in (*files, Path("metrics.jsonl")):
        assert (folder / file).read_bytes() == (straight / file).read_bytes(), file
