"""Checkpoints that are written while training goes on."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aquatint.config.duration import Duration
from aquatint.errors import NumericalError, StorageError
from aquatint.training import checkpoint, saver
from aquatint.training.saver import MAX_FAILED_SAVES, Saver, share_of_memory
from aquatint.training.state import Every, TrainState
from aquatint.training.step import StepReport
from aquatint.training.trainer import StopRequest, Task, train
from tests.training.test_checkpoint import trained
from tests.training.test_trainer import Recorder, run_of

WAIT_SECONDS = 30.0  # for another thread; none of it passes if all is well


class Gate:
    """Holds every write until it is opened; `reached` is set as soon as one is there. `fails` are the steps whose write then fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened, self.fails = threading.Event(), threading.Event(), set[int]()
        self._real = checkpoint.save
        monkeypatch.setattr(checkpoint, "save", self._save)

    def _save(self, folder: Path, source, state: TrainState, **settings) -> Path:
        self.reached.set()
        assert self.opened.wait(WAIT_SECONDS)
        if state.step in self.fails:
            raise StorageError("could not write x: No space left on device", hint="free some space")
        return self._real(folder, source, state, **settings)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found = Gate(monkeypatch)
    yield found
    found.opened.set()


def saver_of(folder: Path, parts=None, *, keep: int = 2, share: float = 1.0) -> Saver:
    return Saver(folder, parts or trained(steps=1), "plan", keep, Recorder(), memory_share=share)


def at(step: int) -> TrainState:
    return TrainState(step=step, samples_seen=2 * step)


def save(one: Saver, step: int) -> None:
    one(at(step), None)  # type: ignore[arg-type]


def steps_in(folder: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.sorted_checkpoints(folder)]


def wait_until_ended(one: Saver) -> None:
    assert one.writing is not None
    one.writing._thread.join(WAIT_SECONDS)
    assert one.writing.ended


def test_training_goes_on_while_it_is_written_and_what_it_changes_is_not_saved(tmp_path: Path, gate: Gate):
    parts = trained(steps=2, power_stds=(0.05,))
    one = saver_of(tmp_path / "meanwhile", parts)
    gate.opened.set()
    saver_of(tmp_path / "waiting", parts, share=0.0).save(at(5))
    gate.opened.clear()
    save(one, 5)
    assert gate.reached.wait(WAIT_SECONDS)
    for table in parts.tables().values():
        for tensor in table.values():
            tensor.data.fill_(7)
    assert steps_in(one.folder) == []
    gate.opened.set()
    one.settle()
    expected, found = (folder / "step-000005" for folder in (tmp_path / "waiting", one.folder))
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in expected.iterdir())
    assert all((found / path.name).read_bytes() == path.read_bytes() for path in expected.iterdir())
    assert checkpoint.problem_of(found) is None


def test_one_is_under_way_at_a_time_and_the_older_ones_stay_until_the_new_one_is_whole(tmp_path: Path, gate: Gate):
    one = saver_of(tmp_path, keep=1)
    gate.opened.set()
    save(one, 1)
    one.settle()
    gate.opened.clear()
    save(one, 2)
    assert steps_in(tmp_path) == [1]
    later = threading.Thread(target=save, args=(one, 3))
    later.start()
    later.join(0.05)
    assert later.is_alive()
    gate.opened.set()
    later.join(WAIT_SECONDS)
    one.settle()
    assert steps_in(tmp_path) == [3]


def test_a_step_that_is_being_saved_is_not_waited_for(tmp_path: Path, gate: Gate):
    one = saver_of(tmp_path)
    save(one, 1)
    first = one.writing
    save(one, 1)
    assert one.writing is first
    gate.opened.set()
    one.save(at(1))
    assert steps_in(tmp_path) == [1]


def test_the_best_is_kept_as_without_it(tmp_path: Path):
    one = saver_of(tmp_path / "checkpoints", keep=1)
    one.metrics = tmp_path / "metrics.jsonl"
    for step, loss in ((1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6)):
        with one.metrics.open("a") as file:
            file.write(f'{{"step": {step}, "val_loss": {loss}, "val_set": 1}}\n')
        save(one, step)
        one.save_best(at(step), None)  # type: ignore[arg-type]
    one.settle()
    assert steps_in(one.folder) == [4, 2]


def test_a_failure_is_reported_at_the_next_step_and_too_many_in_a_row_stop_the_run(tmp_path: Path, gate: Gate):
    one = saver_of(tmp_path)
    gate.opened.set()
    gate.fails = {1, 3, 4, 5}
    for step in (1, 2, 3, 4):
        save(one, step)
        wait_until_ended(one)
        one.look()
        assert one.writing is None
    assert [note.partition(" (")[0] for note in one.display.notes] == [f"warning: step {step} was not saved" for step in (1, 3, 4)]
    assert "No space left on device" in one.display.notes[0]
    assert "free some space" in one.display.notes[0]
    assert len(one.failed) == MAX_FAILED_SAVES - 1
    save(one, 5)
    wait_until_ended(one)
    with pytest.raises(StorageError, match="No space left"):
        one.look()
    assert steps_in(tmp_path) == [2]


def test_a_failure_that_the_next_save_waits_for_counts_too(tmp_path: Path, gate: Gate):
    one = saver_of(tmp_path)
    gate.opened.set()
    gate.fails = {1, 2, 3}
    for step in (1, 2, 3):
        save(one, step)
    with pytest.raises(StorageError):
        save(one, 4)
    assert len(one.display.notes) == 3


def test_what_is_no_failure_of_the_disk_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*arguments: object, **settings: object) -> None:
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(checkpoint, "save", broken)
    one = saver_of(tmp_path)
    save(one, 1)
    wait_until_ended(one)
    with pytest.raises(ValueError, match="of ours"):
        one.look()


def test_the_last_save_waits_and_is_tried_although_those_before_have_failed(tmp_path: Path, gate: Gate):
    one = saver_of(tmp_path)
    gate.opened.set()
    gate.fails = {1, 2, 3}
    for step in (1, 2, 3):
        save(one, step)
    one.save(at(4))
    assert steps_in(tmp_path) == [4]
    assert len(one.display.notes) == 3
    assert one.copy.tables() == {}
    gate.fails = {5}
    with pytest.raises(StorageError):
        one.save(at(5))


@pytest.mark.parametrize("error", [None, NumericalError("not finite", hint="lower it"), StorageError("full", hint="free some")])
def test_a_run_that_ends_waits_for_the_save_under_way(tmp_path: Path, gate: Gate, error: Exception | None):
    def end() -> None:
        with saver_of(tmp_path) as one:
            save(one, 1)
            threading.Timer(0.05, gate.opened.set).start()
            if error is not None:
                raise error

    if error is None:
        end()
    else:
        with pytest.raises(type(error)) as caught:
            end()
        assert caught.value is error
    assert steps_in(tmp_path) == [1]


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, gate: Gate):
    one = saver_of(tmp_path)
    save(one, 1)
    writing = one.writing
    assert writing is not None
    with pytest.raises(KeyboardInterrupt), one:
        raise KeyboardInterrupt
    assert not writing.ended
    assert writing._thread.daemon
    gate.opened.set()
    writing.wait()


def test_without_room_for_a_copy_training_waits_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = saver_of(tmp_path, share=0.5)
    need = one.copy.missing_bytes(one.trained.tables())
    monkeypatch.setattr(saver, "spare_bytes", lambda: 2 * need - 1)
    for step in (1, 2):
        save(one, step)
        assert one.writing is None
        assert steps_in(tmp_path)[0] == step
    assert len(one.display.notes) == 1
    assert "`checkpoints.background`" in one.display.notes[0]
    monkeypatch.setattr(saver, "spare_bytes", lambda: 2 * need)
    save(one, 3)
    monkeypatch.setattr(saver, "spare_bytes", lambda: 0)  # the copy's memory is there already
    save(one, 4)
    assert one.writing is not None
    one.settle()
    assert len(one.display.notes) == 1


def test_memory_that_the_system_does_not_give_is_said_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(tables: object) -> None:
        raise RuntimeError("can't allocate memory: you tried to allocate 99 bytes\nException raised from")

    one = saver_of(tmp_path)
    monkeypatch.setattr(one.copy, "make_room", refuse)
    save(one, 1)
    assert steps_in(tmp_path) == [1]
    assert one.display.notes[0].endswith("(can't allocate memory: you tried to allocate 99 bytes)")


def test_memory_is_taken_unasked_on_a_gpu_alone():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert share_of_memory(False, gpu) == share_of_memory(False, cpu) == share_of_memory("auto", cpu) == 0.0
    assert 0.0 < share_of_memory("auto", gpu) < share_of_memory(True, gpu) == share_of_memory(True, cpu) < 1.0


def test_a_run_looks_after_its_save_at_every_step(tmp_path: Path, gate: Gate):
    one = saver_of(tmp_path)
    gate.opened.set()

    def step(parts, batches, number: int) -> StepReport:
        if number == 3:
            wait_until_ended(one)
        return StepReport(1.0, 1.0, 0.1, True, 2, ("a", "b"))

    run = run_of(Recorder(), steps=4, tasks=(Task(Every(Duration(3, "steps"), 10), one),))
    run.step, run.look_aside = step, one.look
    train(run, StopRequest())
    assert one.writing is None
    assert steps_in(tmp_path) == [3]
