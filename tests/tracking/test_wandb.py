import json
import socket
import time
from pathlib import Path

import pytest

from aquatint.tracking import wandb as ours
from aquatint.tracking.tracker import guarded
from aquatint.tracking.wandb import WandbTracker, run_id


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def open_run(folder: Path, mode="offline", **settings):
    return WandbTracker(folder, project="p", entity=None, mode=mode, name="portrait", config={"run": {"seed": 3}}, **settings)


def test_offline_mode_writes_a_folder_and_a_resumed_run_keeps_its_id(tmp_path):
    for steps in ((10, 20), (20, 30)):
        tracker = open_run(tmp_path)
        for step in steps:
            tracker.log(step, {"loss": 1 / step})
        tracker.close()
    name = json.loads((tmp_path / "wandb.json").read_text())["id"]
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    assert all(file.stat().st_size > 0 for file in files)


def test_the_id_is_made_once_and_survives(tmp_path):
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first
    assert run_id(tmp_path / "other") != first


def test_a_damaged_id_file_gives_a_new_id(tmp_path):
    (tmp_path / "wandb.json").write_text("{")
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first


def test_without_a_key_nobody_is_asked_and_one_warning_says_what_to_do(tmp_path):
    warnings = []
    tracker = guarded("Weights & Biases", lambda: open_run(tmp_path, mode="online"), warnings.append)
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert len(warnings) == 1
    assert "wandb login" in warnings[0]


def test_a_server_that_never_answers_holds_nothing_up(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        warnings = []
        started = time.monotonic()
        tracker = guarded("W&B", lambda: open_run(tmp_path, mode="online", close_seconds=1.0), warnings.append)
        for step in range(1000):
            tracker.log(step, {"loss": 1.0})
        assert time.monotonic() - started < 1.0
        tracker.close()
    assert time.monotonic() - started < 4.0
    assert len(warnings) == 1
    assert "wandb sync" in warnings[0]


def stub(monkeypatch, code):
    """Puts a child of ours in the place of the real one."""
    popen = ours.subprocess.Popen
    monkeypatch.setattr(ours.subprocess, "Popen", lambda command, **kwargs: popen([command[0], "-c", code], **kwargs))


def test_a_child_that_dies_is_noticed_with_its_last_words(tmp_path, monkeypatch):
    stub(monkeypatch, "import sys; sys.stdin.readline(); print('quota exceeded'); sys.exit(1)")
    tracker = open_run(tmp_path)
    deadline = time.monotonic() + 10

    def log_for_a_while():
        while time.monotonic() < deadline:
            tracker.log(1, {"loss": 1.0})
            time.sleep(0.01)

    with pytest.raises(RuntimeError, match="quota exceeded"):
        log_for_a_while()


def test_a_child_that_dies_without_a_word_is_named_by_its_code(tmp_path, monkeypatch):
    stub(monkeypatch, "import sys; sys.stdin.read(); sys.exit(7)")
    with pytest.raises(RuntimeError, match="ended with code 7"):
        open_run(tmp_path).close()


def test_a_child_that_reads_nothing_never_blocks_and_is_given_up_in_the_end(tmp_path, monkeypatch):
    stub(monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(ours, "MAX_PENDING_BYTES", 1 << 18)
    tracker = open_run(tmp_path)

    def log_a_lot():
        for step in range(100_000):
            tracker.log(step, {"loss": 1.0})

    with pytest.raises(RuntimeError, match="too slowly"):
        log_a_lot()


def test_every_row_reaches_the_child_in_order(tmp_path, monkeypatch):
    target = tmp_path / "seen.jsonl"
    stub(monkeypatch, f"import sys, time; time.sleep(0.3); open({str(target)!r}, 'w').write(sys.stdin.read())")
    tracker = open_run(tmp_path)
    for step in range(5000):
        tracker.log(step, {"loss": 0.1})
    tracker.image(5000, "samples", tmp_path / "a.png")
    tracker.close()
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["log"]["step"] for row in rows[1:-2]] == list(range(5000))
    assert rows[0]["start"]["mode"] == "offline"
    assert rows[0]["config"] == {"run": {"seed": 3}}
    assert rows[-2] == {"image": "samples", "step": 5000, "path": str(tmp_path / "a.png")}
    assert rows[-1] == {"finish": True}


def test_a_missing_library_is_said_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install"):
        open_run(tmp_path)
