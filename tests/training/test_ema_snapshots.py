from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from aquatint import storage
from aquatint.errors import NumericalError, UsageError
from aquatint.optim.power_average import gamma_of_std
from aquatint.tensor_file import LazyTensor, TensorFile, write_tensors
from aquatint.training.ema import Ema
from aquatint.training.ema_snapshots import choose, find_snapshots, rebuilt, remove_after, snapshot_action, write_snapshots
from aquatint.training.state import TrainState

STEPS, PER_STEP = 60, 2
SHAPES = {"a": (4, 3), "b": (2,)}


class Base:
    """What a snapshot needs of a base model, whose weights are far larger than what training changes."""

    path = Path("base.safetensors")

    def __init__(self, value: float = 3.3) -> None:
        self.value = value

    def digest(self, component: str) -> str:
        return f"{component} of {self.value}"

    def component(self, component: str) -> dict[str, LazyTensor]:
        half = torch.float16
        return {name: LazyTensor(half, shape, partial(torch.full, shape, self.value, dtype=half)) for name, shape in SHAPES.items()}


def parameters() -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(tensor.load().float()) for name, tensor in Base().component("unet").items()}


def train(folder: Path, *, every: int = 5, stds: tuple[float, ...] = (0.05, 0.1)) -> list[dict[str, torch.Tensor]]:
    """A run of random steps that leaves snapshots. Returns the weights after each step."""
    generator, weights, seen = torch.Generator().manual_seed(0), parameters(), []
    ema = Ema(weights, decay=0.9, warmup=False, device=None, power_stds=stds, samples_per_step=PER_STEP)
    for step in range(STEPS):
        for p in weights.values():
            p.data += 1e-4 * torch.randn(p.shape, generator=generator) + 5e-5
        seen.append({name: p.detach().clone() for name, p in weights.items()})
        ema.update(step)
        if (step + 1) % every == 0:
            write_snapshots(folder, ema, Base(), TrainState(step + 1, PER_STEP * (step + 1)))
    return seen


def direct(seen: list[dict[str, torch.Tensor]], std: float, name: str) -> torch.Tensor:
    edges = np.arange(len(seen) + 1) / len(seen)
    shares = np.diff(edges ** (gamma_of_std(std) + 1))
    return sum((share * weights[name].double() for share, weights in zip(shares, seen, strict=True)), torch.zeros(SHAPES[name]).double())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("run") / "ema"
    return folder, train(folder)


@pytest.mark.parametrize(("std", "step"), [(0.08, None), (0.12, None), (0.08, 45), (0.05, 60)])
def test_an_average_that_was_not_kept_is_made_of_snapshots(run, std: float, step: int | None):
    """To within 1 % of its distance from the last weights, although float16 has steps of 2e-3 where the weights are."""
    folder, seen = run
    seen = seen[:step]
    with rebuilt(folder, std, step, Base()) as average:
        for name in SHAPES:
            expected, found = direct(seen, std, name), average.weights[name].load()
            assert found.dtype == average.weights[name].dtype == torch.float32
            assert (found - expected).norm() < 0.01 * (seen[-1][name] - expected).norm()


def test_it_says_what_it_is_made_of(run):
    with rebuilt(run[0], 0.08, 45, Base()) as average:
        words = str(average)
    assert words.startswith("an average of width 0.08 at step 45, from 18 snapshots, shares from -0.")
    assert words.endswith(f"; its profile differs by {average.mix.residual:.2%}")
    assert average.mix.residual < 0.02


def test_a_snapshot_says_what_it_is_and_is_half_precision(run):
    first = find_snapshots(run[0])[0]
    assert first.path.name == "step-000005-std-0.050.safetensors"
    assert (first.std, first.step, first.samples) == (0.05, 5, 10)
    with TensorFile(first.path) as file:
        assert {info.dtype for info in file.tensors.values()} == {"F16"}


@pytest.mark.parametrize("value", [7e4, float("nan")])
def test_what_float16_cannot_hold_is_not_written(tmp_path: Path, value: float):
    weights = parameters()
    weights["b"].data[1] = value
    ema = Ema(weights, decay=0.9, warmup=False, device=None, power_stds=(0.1,))
    with pytest.raises(NumericalError, match="weight `b`"):
        write_snapshots(tmp_path, ema, Base(), TrainState(1, 1))
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_is_written_once(tmp_path: Path):
    train(tmp_path, every=60)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    ema = Ema(parameters(), decay=0.9, warmup=False, device=None, power_stds=(0.05, 0.1))
    write_snapshots(tmp_path, ema, Base(), TrainState(60, 120))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_run_that_goes_on_leaves_none_of_later_steps(tmp_path: Path):
    train(tmp_path, every=20)
    (tmp_path / "notes.txt").write_text("mine")
    remove_after(tmp_path, 40)
    assert sorted({snapshot.step for snapshot in find_snapshots(tmp_path)}) == [20, 40]
    assert (tmp_path / "notes.txt").exists()
    remove_after(tmp_path / "missing", 0)


def test_a_full_disk_costs_a_snapshot_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    notes: list[str] = []
    ema = Ema(parameters(), decay=0.9, warmup=False, device=None, power_stds=(0.1,))
    action = snapshot_action(tmp_path / "ema", ema, Base(), notes.append)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    state = TrainState(3, 6)
    assert action(state) == state
    monkeypatch.undo()
    assert len(notes) == 1
    assert "step 3" in notes[0]
    assert "No space left" in notes[0]
    action(state)
    assert len(find_snapshots(tmp_path / "ema")) == 1


def test_a_run_without_averages_writes_nothing(tmp_path: Path):
    snapshot_action(tmp_path / "ema", None, Base(), print)(TrainState(3, 6))
    snapshot_action(tmp_path / "ema", Ema(parameters(), decay=0.9, warmup=False, device=None), Base(), print)(TrainState(3, 6))
    assert not (tmp_path / "ema").exists()


@pytest.mark.parametrize(
    ("std", "step", "words"),
    [(0.08, 7, "no snapshot of step 7"), (0.3, None, "no average of width 0.3"), (0.005, None, "cannot be made: the nearest one differs")],
)
def test_what_cannot_be_made_is_refused_with_what_can(run, std: float, step: int | None, words: str):
    with pytest.raises(UsageError, match=words) as caught:
        choose(find_snapshots(run[0]), std, step)
    assert any(number in caught.value.hint for number in ("5, 10, 15", "0.05, 0.1"))


def test_a_width_far_from_one_that_was_kept_is_possible_with_enough_snapshots(run):
    assert choose(find_snapshots(run[0]), 0.2, None)[2].residual < 0.1
    assert choose(find_snapshots(run[0])[:4], 0.2, None)[2].residual > 0.2


def test_without_snapshots_the_setting_is_named(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match="no snapshots") as caught:
            find_snapshots(folder)
        assert "ema.power_stds" in caught.value.hint


def test_another_base_is_refused(run):
    with pytest.raises(UsageError, match=r"was not taken with the base model base\.safetensors"), rebuilt(run[0], 0.08, None, Base(3.4)):
        pass


def test_a_file_that_says_nothing_of_itself_is_refused(tmp_path: Path):
    write_tensors(tmp_path / "step-000005-std-0.050.safetensors", {"a": torch.zeros(4, 3)})
    with pytest.raises(UsageError, match="does not say"):
        find_snapshots(tmp_path)
