import json

from aquatint.config.duration import Duration
from aquatint.training.state import Every, TrainState


def every(text: str) -> Every:
    return Every(Duration.parse(text), samples_per_epoch=10)


def test_advance_counts_steps_and_samples():
    state = TrainState().advance(samples=4, loss=0.5, finite=True).advance(samples=4, loss=0.25, finite=True)
    assert (state.step, state.samples_seen, state.loss_sum, state.loss_count) == (2, 8, 0.75, 2)


def test_a_bad_step_uses_its_samples_but_not_its_loss():
    state = TrainState().advance(samples=4, loss=float("nan"), finite=False)
    assert (state.samples_seen, state.bad_steps, state.loss_sum, state.loss_count) == (4, 1, 0.0, 0)
    assert state.advance(samples=4, loss=1.0, finite=True).bad_steps == 0


def test_the_state_survives_json():
    parts = [("t000_249", 0.1), ("t000_249", 0.2), ("64x96", 0.7)]
    state = TrainState(step=3, samples_seen=7, loss_sum=0.1 + 0.2, loss_count=2).advance(samples=1, loss=0.3, finite=True, parts=parts)
    again = TrainState(**json.loads(json.dumps(state.as_json())))
    assert again == state
    assert list(again.part_sums) == list(state.part_sums), "in the same order, so that checkpoints are the same too"


def test_a_state_from_before_losses_were_told_apart_can_be_read():
    assert TrainState(step=3, samples_seen=7, bad_steps=0, loss_sum=0.5, loss_count=1).mean_losses() == {"loss": 0.5}


def test_a_step_ahead_is_counted_and_nothing_else_is_known_of_it():
    state = TrainState(step=3, samples_seen=7, loss_sum=1.0, loss_count=2, bad_steps=1)
    assert state.ahead(4) == TrainState(step=4, samples_seen=11, loss_sum=1.0, loss_count=2, bad_steps=1)


def test_losses_of_parts_are_summed_by_name_until_they_are_logged():
    first = TrainState().advance(samples=2, loss=1.0, finite=True, parts=[("a", 1.0), ("b", 5.0)])
    second = first.advance(samples=2, loss=3.0, finite=True, parts=[("a", 2.0)])
    assert second.mean_losses() == {"loss": 2.0, "loss_a": 1.5, "loss_b": 5.0}
    assert first.mean_losses() == {"loss": 1.0, "loss_a": 1.0, "loss_b": 5.0}, "a state is a value"
    assert second.logged() == TrainState(step=2, samples_seen=4)


def test_due_at_multiples_of_steps():
    due = [every("3 steps").due(TrainState(step=i), TrainState(step=i + 1)) for i in range(9)]
    assert due == [False, False, True] * 3


def test_due_once_when_samples_jump_over_a_multiple():
    duration = every("10 samples")
    assert duration.due(TrainState(samples_seen=8), TrainState(samples_seen=12))
    assert not duration.due(TrainState(samples_seen=12), TrainState(samples_seen=16))


def test_an_epoch_is_a_lap_over_the_pictures():
    assert every("1 epoch").due(TrainState(samples_seen=8), TrainState(samples_seen=12))
    assert not every("2 epochs").due(TrainState(samples_seen=8), TrainState(samples_seen=12))


def test_time_is_measured_by_the_caller():
    assert every("1 min").due(TrainState(), TrainState(step=1), seconds=61)
    assert not every("1 min").due(TrainState(), TrainState(step=1), seconds=59)


def test_never_due_without_a_duration():
    assert not Every(None, 10).due(TrainState(), TrainState(step=1))
    assert not every("0 steps").due(TrainState(), TrainState(step=1))
