"""Every optimizer of a library comes back from a checkpoint bit for bit, and the average of schedule-free training follows from it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from aquatint.errors import ResumeError
from aquatint.optim.clipping import Clipping
from aquatint.training import checkpoint
from aquatint.training.checkpoint import Trained
from aquatint.training.free_average import FreeAverage, averages_of
from aquatint.training.main_memory import Copy
from aquatint.training.state import TrainState
from tests.optim.library_models import HEAVY, QUICK, Model, everything, is_same, make, train

EACH = pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=[pytest.mark.libraries, pytest.mark.filterwarnings("ignore")]) for name in HEAVY)]
)


def save(folder: Path, trained: Trained) -> Path:
    return checkpoint.save(folder, trained, TrainState(step=4), plan_digest="plan", keep=2)


@EACH
def test_a_restored_run_goes_on_bit_for_bit(tmp_path: Path, name: str):
    straight, resumed = Model(0), Model(1)
    first, second = make(name, straight), make(name, resumed)
    train(straight, first, range(4))
    checkpoint.restore(save(tmp_path, Trained(straight, first, None)), Trained(resumed, second, None), plan_digest="plan")
    assert is_same(everything(straight, first), everything(resumed, second))
    train(straight, first, range(4, 8))
    train(resumed, second, range(4, 8))
    assert is_same(everything(straight, first), everything(resumed, second))


@EACH
def test_a_run_that_has_made_no_step_comes_back_too(tmp_path: Path, name: str):
    straight, resumed = Model(0), Model(1)
    first, second = make(name, straight), make(name, resumed)
    checkpoint.restore(save(tmp_path, Trained(straight, first, None)), Trained(resumed, second, None), plan_digest="plan")
    train(straight, first, range(3))
    train(resumed, second, range(3))
    assert is_same(everything(straight, first), everything(resumed, second))


def test_a_copy_in_main_memory_is_of_its_time():
    model, copy = Model(), Copy()
    trained = Trained(model, make("schedule_free", model), None, None, Clipping("delayed", 1.0))
    train(model, trained.optimizer, range(2))
    tables = trained.tables()
    expected = {key: tensor.clone() for key, tensor in tables["optimizer"].items()}
    copy.make_room(tables)
    copy.take(tables)
    train(model, trained.optimizer, range(2, 4))
    assert is_same(dict(copy.tables()["optimizer"]), expected)


@pytest.mark.parametrize("name", ["prodigy", "lion"])
def test_what_another_optimizer_counted_is_refused(tmp_path: Path, name: str):
    model = Model()
    path = save(tmp_path, Trained(model, make("schedule_free", model), None))
    with pytest.raises(ResumeError, match="does not fit this run: what it counts in group 0"):
        checkpoint.restore(path, Trained(model, make(name, model), None), plan_digest="plan")


def test_state_of_a_weight_that_is_not_trained_is_refused(tmp_path: Path):
    model, other = Model(), nn.Linear(2, 3)
    optimizer = make("torch_adafactor", model)
    train(model, optimizer, range(1))
    path = save(tmp_path, Trained(model, optimizer, None))
    with pytest.raises(ResumeError, match=r"it holds state of `conv\.\w+`, which is not trained here"):
        checkpoint.restore_optimizer(path / "optimizer.safetensors", Trained(other, make("torch_adafactor", other), None))


def schedule_free(steps: int) -> tuple[Model, FreeAverage, dict[str, torch.Tensor]]:
    """A model in the middle of training, its average, and what the library makes of the model when it is asked to evaluate."""
    model, reference = Model(), Model()
    optimizer, other = make("schedule_free", model, learning_rate=1e-2), make("schedule_free", reference, learning_rate=1e-2)
    train(model, optimizer, range(steps))
    train(reference, other, range(steps))
    other.parts[0].eval()
    return model, FreeAverage(optimizer), {name: param.detach() for name, param in reference.named_parameters()}


@pytest.mark.parametrize("steps", [0, 5])
def test_the_average_is_that_of_the_library_and_the_weights_come_back_bit_for_bit(steps: int):
    model, average, expected = schedule_free(steps)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    assert is_same({name: tensor.load() for name, tensor in average.average.items()}, expected)
    with average.applied():
        assert is_same(dict(model.named_parameters()), expected)
    assert is_same(dict(model.named_parameters()), before)


def test_a_checkpoint_holds_no_average_but_what_it_follows_from(tmp_path: Path):
    model, average, expected = schedule_free(5)
    path = save(tmp_path, Trained(model, average._optimizer, average))
    assert not (path / "ema.safetensors").exists()
    weights, state = (checkpoint.lazy_weights(path / f"{name}.safetensors") for name in ("unet", "optimizer"))
    found = averages_of(weights, state, 0.9)
    assert is_same({name: tensor.load() for name, tensor in found.items()}, expected)
