import os
import signal
from collections.abc import Generator
from dataclasses import dataclass
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
from aquatint.training.trainer import Run, StopRequest, Task, due_tasks, graceful_stop, train


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


@dataclass(frozen=True)
class Slow:
    """A step whose numbers are on their way for as long as nobody asks for them."""

    report: StepReport
    events: list[str]
    number: int

    @property
    def samples(self) -> int:
        return self.report.samples

    def is_ready(self) -> bool:
        return False

    def read(self) -> StepReport:
        if f"read {self.number}" not in self.events:
            self.events.append(f"read {self.number}")
        return self.report


def slow_run(recorder: Recorder, losses: list[float], events: list[str], **settings) -> Run:
    """As on a GPU; steps are numbered from 1."""
    run = run_of(recorder, **settings)

    def step(parts, batches, number: int) -> Slow:
        events.append(f"launch {number + 1}")
        return Slow(trainer.train_step(parts, batches, number), events, number + 1)

    run.step = step
    return run


def every(steps: int, run) -> Task:
    return Task(Every(Duration(steps, "steps"), 1), run)


def test_a_step_is_read_when_the_next_one_is_launched_or_a_task_is_due(losses: list[float]):
    recorder, events = Recorder(), list[str]()
    task = every(3, lambda state, report: events.append(f"task {state.step}") or state)
    train(slow_run(recorder, losses, events, steps=5, tasks=(task,)), StopRequest())
    assert events == [
        "launch 1", "launch 2", "read 1", "launch 3", "read 2", "read 3", "task 3", "launch 4", "launch 5", "read 4", "read 5",
    ]  # fmt: skip
    assert recorder.last[0] == 5


def test_reading_late_changes_no_row_and_no_state(losses: list[float]):
    losses += [1.0, 2.0, float("nan"), 4.0, float("nan"), 6.0, 7.0]
    prompt, late = Recorder(), Recorder()
    straight = train(run_of(prompt, steps=7, tasks=(every(2, log_action(prompt)),)), StopRequest())
    lagging = train(slow_run(late, losses, [], steps=7, tasks=(every(2, log_action(late)),)), StopRequest())
    assert lagging == straight
    assert late.rows == prompt.rows
    assert late.notes == prompt.notes
    assert len(late.notes) == 2
    assert late.last[0] == prompt.last[0] == 7
    assert late.last[1]["loss"] == prompt.last[1]["loss"]


def test_too_many_bad_steps_are_noticed_one_step_late_and_before_the_next_task(losses: list[float]):
    losses += [1.0, float("nan"), float("nan"), float("nan")]
    events: list[str] = []
    task = every(5, lambda state, report: events.append("task") or state)
    with pytest.raises(NumericalError, match="3 steps in a row, last at step 4"):
        train(slow_run(Recorder(), losses, events, steps=10, tasks=(task,)), StopRequest())
    assert events[-2:] == ["launch 5", "read 4"]


@pytest.mark.parametrize("bad", [False, True])
def test_a_stop_and_the_end_wait_for_the_step_that_was_launched(losses: list[float], bad: bool):
    losses += [1.0, 1.0, float("nan") if bad else 1.0]
    recorder, stop = Recorder(), StopRequest()
    run = slow_run(recorder, losses, [], steps=10)
    launch = run.step

    def stopping(parts, batches, number: int) -> Slow:
        stop.asked = number == 2
        return launch(parts, batches, number)

    run.step = stopping
    result = train(run, stop)
    assert result.stopped
    assert (result.state.step, result.state.samples_seen, result.state.bad_steps, result.state.loss_count) == (3, 6, bad, 3 - bad)
    assert len(recorder.notes) == bad


def test_a_loader_that_stops_with_the_run_loses_no_step(losses: list[float]):
    stop = StopRequest()
    run = slow_run(Recorder(), losses, [], steps=10)

    def stream(state: TrainState) -> Generator[int]:
        yield from range(4)
        stop.asked = True
        raise StorageError("a worker has ended", hint="")

    run.stream = stream
    assert train(run, stop).state.step == 4


def test_what_goes_on_beside_the_loop_is_looked_at_after_every_step(losses: list[float]):
    events: list[str] = []
    run = slow_run(Recorder(), losses, events, steps=3, tasks=(every(3, lambda state, report: events.append("task") or state),))
    run.look_aside = lambda: events.append("look")
    train(run, StopRequest())
    assert events == ["launch 1", "look", "launch 2", "read 1", "look", "launch 3", "read 2", "look", "read 3", "task"]


def test_tasks_of_one_duration_come_together_however_long_they_take(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    tasks = [Task(Every(Duration(10, "seconds"), 1), lambda state, report: state) for _ in range(2)]
    place = TrainState()
    for seconds, expected in ((9.0, 0), (11.0, 2), (20.0, 0), (21.5, 2)):
        now[0] = seconds
        due = due_tasks(tasks, place, place.ahead(2))
        assert len(due) == expected


@pytest.mark.parametrize(
    ("loss", "by_part", "words"),
    [
        (float("nan"), False, "was left out (pictures"),
        (float("nan"), True, "was left out (pictures"),
        (0.5, False, "was left out (pictures"),
        (0.5, True, "was left out for the weights whose gradient was not finite (pictures"),
    ],
)
def test_the_warning_says_what_was_left_out(loss: float, by_part: bool, words: str):
    recorder = Recorder()
    report = StepReport(loss, float("inf"), 0.1, False, 2, ("a", "b"), by_part=by_part)
    trainer.guard(run_of(recorder, steps=9), TrainState(step=4, bad_steps=1), report)
    assert recorder.notes == [f"warning: step 4 gave a loss of {loss} and a gradient of norm inf and {words}: a, b)"]


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
