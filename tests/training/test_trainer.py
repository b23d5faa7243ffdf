import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

from aquatint.config.duration import Duration
from aquatint.errors import NumericalError, StorageError
from aquatint.training import trainer
from aquatint.training.breakdown import Breakdown
from aquatint.training.saver import MAX_FAILED_SAVES, Saver
from aquatint.training.state import Every, TrainState
from aquatint.training.step import StepReport
from aquatint.training.tasks import log_action
from aquatint.training.trainer import Run, StopRequest, Task, graceful_stop, train


class Recorder:
    """Stands for the display and for a tracker."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rows: list[dict[str, float]] = []

    def update(self, step: int, **figures: float) -> None:
        self.last = (step, figures)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.rows.append({"step": step, **values})


def run_of(recorder: Recorder, *, steps: int, state: TrainState | None = None, tasks: tuple[Task, ...] = (), accumulation: int = 1) -> Run:
    def stream(state: TrainState) -> Generator[int]:
        yield from range(state.samples_seen // 2, 10**6)

    return Run(
        folder=Path("run"),
        parts=None,
        state=state or TrainState(),
        stream=stream,
        accumulation_steps=accumulation,
        total_steps=steps,
        max_bad_steps=3,
        tasks=tasks,
        display=recorder,
    )  # type: ignore[arg-type]


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The loss of each step; after the list's end it is 1. Batches are numbers here, and a step notes them as names."""
    values: list[float] = []

    def fake_step(parts, batches, step) -> StepReport:
        loss = values[step] if step < len(values) else 1.0
        return StepReport(loss, 1.0, 0.1, loss == loss, 2 * len(batches), tuple(map(str, batches)))

    monkeypatch.setattr(trainer, "train_step", fake_step)
    return values


def test_the_run_ends_at_its_length_and_counts_from_the_beginning(losses: list[float]):
    result = train(run_of(Recorder(), steps=5, state=TrainState(step=3, samples_seen=6)), StopRequest())
    assert (result.state.step, result.state.samples_seen, result.stopped) == (5, 10, False)


def test_each_step_takes_the_next_batches(losses: list[float]):
    seen: list[tuple[str, ...]] = []
    collect = Task(Every(Duration(1, "steps"), 1), lambda state, report: seen.append(report.names) or state)
    train(run_of(Recorder(), steps=3, tasks=(collect,), accumulation=2), StopRequest())
    assert seen == [("0", "1"), ("2", "3"), ("4", "5")]


def test_a_logged_row_is_the_mean_since_the_last_one_and_skips_bad_steps(losses: list[float]):
    losses += [1.0, 3.0, float("nan"), 5.0]
    recorder = Recorder()
    train(run_of(recorder, steps=4, tasks=(Task(Every(Duration(2, "steps"), 1), log_action(recorder)),)), StopRequest())
    assert [(row["step"], row["loss"]) for row in recorder.rows] == [(2, 2.0), (4, 5.0)]
    assert "left out" in recorder.notes[0]


def test_a_logged_row_tells_the_losses_apart(monkeypatch: pytest.MonkeyPatch):
    """A step has a sample at t = 100 and one at t = 900; over the two steps of a row, 1 and 2 at the one, 5 and 9 at the other."""

    def fake_step(parts, batches, step) -> StepReport:
        losses = (float(step + 1), 4.0 * step + 5)
        return StepReport(1.0, 1.0, 0.1, True, 2, ("a", "b"), losses, timesteps=(100, 900), sources=(0, 1), sizes_hw=((8, 8), (8, 8)))

    monkeypatch.setattr(trainer, "train_step", fake_step)
    recorder = Recorder()
    run = run_of(recorder, steps=4, tasks=(Task(Every(Duration(2, "steps"), 1), log_action(recorder)),))
    run.breakdown = Breakdown(by_size=False, by_source=True)
    train(run, StopRequest())
    assert {name: value for name, value in recorder.rows[0].items() if name.startswith("loss")} == {
        "loss": 1.0, "loss_t000_249": 1.5, "loss_t750_999": 7.0, "loss_source_0": 1.5, "loss_source_1": 7.0,
    }  # fmt: skip
    assert recorder.rows[1]["loss_source_0"] == 3.5


def test_a_run_that_has_ended_early_is_not_trained_and_not_stopped(losses: list[float]):
    run = run_of(Recorder(), steps=10)
    run.has_ended = lambda: True
    result = train(run, StopRequest())
    assert (result.state.step, result.stopped) == (0, False)


def test_too_many_bad_steps_in_a_row_stop_the_run(losses: list[float]):
    losses += [1.0, float("nan"), float("nan"), float("nan")]
    with pytest.raises(NumericalError, match="3 steps in a row, last at step 4") as caught:
        train(run_of(Recorder(), steps=10), StopRequest())
    assert caught.value.exit_code == 4


def test_a_run_may_have_a_step_and_a_learning_rate_of_its_own(losses: list[float]):
    run = run_of(Recorder(), steps=4)
    run.step = lambda parts, batches, step: StepReport(float("nan"), 1.0, 0.1, False, 2, ("a",))
    run.rate_setting = "vae_training.learning_rate"
    with pytest.raises(NumericalError) as caught:
        train(run, StopRequest())
    assert "lower vae_training.learning_rate" in caught.value.hint


def test_bad_steps_apart_from_each_other_do_not(losses: list[float]):
    losses += [float("nan"), float("nan"), 1.0, float("nan"), float("nan")]
    assert train(run_of(Recorder(), steps=6), StopRequest()).state.step == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_lets_the_step_finish_and_stops(losses: list[float], number: signal.Signals):
    before = signal.getsignal(number)

    def interrupt(state: TrainState, report: StepReport) -> TrainState:
        if state.step == 2:
            os.kill(os.getpid(), number)
        return state

    with graceful_stop() as stop:
        result = train(run_of(Recorder(), steps=10, tasks=(Task(Every(Duration(1, "steps"), 1), interrupt),)), stop)
    assert (result.state.step, result.stopped) == (2, True)
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_leaves_at_once():
    with graceful_stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_failed_save_is_announced_and_training_goes_on_until_it_fails_too_often(monkeypatch: pytest.MonkeyPatch):
    recorder = Recorder()
    saver = Saver(Path("run"), None, "plan", 2, recorder)  # type: ignore[arg-type]

    def full(state: TrainState) -> None:
        raise StorageError("could not write x: No space left on device", hint="free some space")

    monkeypatch.setattr(saver, "save", full)
    for _ in range(MAX_FAILED_SAVES - 1):
        assert saver(TrainState(step=4), None) == TrainState(step=4)  # type: ignore[arg-type]
    assert "step 4 was not saved" in recorder.notes[0]
    assert "free some space" in recorder.notes[0]
    with pytest.raises(StorageError):
        saver(TrainState(step=4), None)  # type: ignore[arg-type]
