"""Snapshots of the power averages during a run, and averages of other lengths made of them afterwards.

A snapshot is a file `step-001000-std-0.050.safetensors` with the difference between the average and the base model, as float16. Fine-tuning
moves weights by so little that the weights themselves as float16 would lose a good part of it; of the difference, a 2000th is lost.
What an adapter adds is no change of a weight: its averages are written as they are, in float32.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from aquatint.errors import NumericalError, StorageError, UsageError
from aquatint.models.sdxl.load import BaseModel
from aquatint.models.sdxl.shapes import TEXT_ENCODERS, is_text
from aquatint.optim.power_average import Mix, gamma_of_std, solve_mix
from aquatint.storage import remove_file, remove_temporaries
from aquatint.tensor_file import LazyTensor, TensorFile, write_tensors
from aquatint.training.ema import Ema
from aquatint.training.free_average import FreeAverage
from aquatint.training.state import TrainState

WIDEST_STD = 0.28  # all weights of the run count the same at 0.2887
NOTABLE_RESIDUAL, MAX_RESIDUAL = 0.1, 0.5
_NAME = re.compile(r"step-(\d{6,})-std-\d\.\d{3}\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """An average of relative standard deviation `std`, as it was at `step`, after so many samples of the run. `base` is a digest."""

    path: Path
    std: float
    step: int
    samples: int
    base: str


@dataclass(frozen=True)
class Rebuilt:
    """An average that was never tracked. `weights` are float32, each tensor made from the snapshots when its turn comes."""

    std: float
    step: int
    snapshots: tuple[Snapshot, ...]
    mix: Mix
    weights: dict[str, LazyTensor]

    def __str__(self) -> str:
        shares, count = self.mix.shares, len(self.snapshots)
        files = f"{count} snapshot{'' if count == 1 else 's'}, shares from {shares.min():.3f} to {shares.max():.3f}"
        return f"an average of width {self.std:g} at step {self.step:,}, from {files}; its profile differs by {self.mix.residual:.2%}"


def write_snapshots(folder: Path, ema: Ema | FreeAverage, base: BaseModel, state: TrainState) -> None:
    """Writes each power average as it is now, unless that was done already. Raises StorageError; NumericalError for a broken model."""
    for std, track in ema.tracks.items():
        path = folder / f"step-{state.step:06}-std-{std:.3f}.safetensors"
        if not path.exists():
            digest = origin_digest(base, track)
            metadata = {"std": repr(std), "step": str(state.step), "samples": str(state.samples_seen), "base": digest}
            origin = origin_of(base, track)
            write_tensors(path, {name: _snapshot_tensor(name, tensor, origin.get(name)) for name, tensor in track.items()}, metadata)


def origin_digest(base: BaseModel, names: Iterable[str]) -> str:
    """Stands for the networks of the base that tensors of these names come from."""
    return f"{base.digest('unet')} {base.digest('text_encoders')}" if any(map(is_text, names)) else base.digest("unet")


def origin_of(base: BaseModel, names: Iterable[str]) -> Mapping[str, LazyTensor]:
    """The tensors of those networks."""
    return base.tensors(("unet", *TEXT_ENCODERS)) if any(map(is_text, names)) else base.component("unet")


def _snapshot_tensor(name: str, average: torch.Tensor, origin: LazyTensor | None) -> LazyTensor:
    """What is written of one average: its difference as float16, or all of it as float32 where the base has no such weight."""
    dtype = torch.float32 if origin is None else torch.float16
    return LazyTensor(dtype, tuple(average.shape), partial(_difference, name, average, origin))


def _difference(name: str, average: torch.Tensor, origin: LazyTensor | None) -> torch.Tensor:
    difference = average.cpu() if origin is None else (average.cpu() - origin.load().to(torch.float32)).to(torch.float16)
    if not difference.isfinite().all():
        raise NumericalError(
            f"the average of the weight `{name}` is not a finite number, or more than 65504 away from the base model",
            hint="go on from an earlier checkpoint with a lower optimizer.learning_rate",
        )
    return difference


def snapshot_action(folder: Path, ema: Ema | FreeAverage | None, base: BaseModel, note: Callable[[str], None]) -> Callable[..., TrainState]:
    """Writes snapshots. A full disk costs one of them, not the run: the reason is noted."""

    def run(state: TrainState, report: object = None) -> TrainState:
        try:
            if ema is not None:
                write_snapshots(folder, ema, base, state)
        except StorageError as error:
            note(f"warning: no snapshot of the averages at step {state.step}: {error.message}; {error.hint}")
        return state

    return run


def remove_after(folder: Path, step: int) -> None:
    """Removes snapshots of later steps, which the run is about to take anew, and what a crash left half-written. Raises StorageError."""
    remove_temporaries(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) > step:
            remove_file(path)


def find_snapshots(folder: Path) -> list[Snapshot]:
    """All snapshots of a run, oldest first. Raises UsageError if there are none, or one does not say what it is."""
    found = [_read(path) for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    if not found:
        raise UsageError(
            f"there are no snapshots of averages in {folder}",
            hint="they are taken during a run, so set `ema.power_stds = [0.05, 0.1]` before it begins",
        )
    return sorted(found, key=lambda snapshot: (snapshot.samples, snapshot.std))


def _read(path: Path) -> Snapshot:
    with TensorFile(path) as file:
        match file.metadata:
            case {"std": std, "step": step, "samples": samples, "base": base}:
                return Snapshot(path, float(std), int(step), int(samples), base)
    raise UsageError(f"{path} does not say of which step and average it is", hint="it is none of ours: put it elsewhere")


def choose(snapshots: Sequence[Snapshot], std: float, step: int | None) -> tuple[tuple[Snapshot, ...], int, Mix]:
    """The snapshots up to a step (the last one's if None), that step, and what each gives to the wanted average.

    Raises UsageError for a step without a snapshot, and for an average that they cannot make.
    """
    samples_at = {snapshot.step: snapshot.samples for snapshot in snapshots}
    step = max(samples_at) if step is None else step
    if step not in samples_at:
        known = ", ".join(str(one) for one in sorted(samples_at))
        raise UsageError(f"there is no snapshot of step {step}", hint=f"an average can end where one was taken: {known}")
    used = tuple(snapshot for snapshot in snapshots if snapshot.samples <= samples_at[step])
    widths = ", ".join(f"{one:g}" for one in sorted({snapshot.std for snapshot in used}))
    if not 0 < std <= WIDEST_STD:
        raise UsageError(f"there is no average of width {std:g}", hint=f"write one up to {WIDEST_STD}; the run kept {widths}")
    times, gammas = [snapshot.samples for snapshot in used], [gamma_of_std(snapshot.std) for snapshot in used]
    mix = solve_mix(times, gammas, samples_at[step], gamma_of_std(std))
    if mix.residual > MAX_RESIDUAL:
        raise UsageError(
            f"an average of width {std:g} at step {step} cannot be made: the nearest one differs by {mix.residual:.0%}",
            hint=f"the run kept {widths}, in {len(used)} snapshots by then: choose a width nearer to these, or a later step",
        )
    return used, step, mix


@contextlib.contextmanager
def rebuilt(folder: Path, std: float, step: int | None, base: BaseModel) -> Iterator[Rebuilt]:
    """An average of any width from the snapshots in `folder`, to be used inside the block. Raises UsageError, also for another base."""
    used, step, mix = choose(find_snapshots(folder), std, step)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(TensorFile(snapshot.path)) for snapshot in used]
        for snapshot, file in zip(used, files, strict=True):
            if snapshot.base != origin_digest(base, file.tensors):
                raise UsageError(
                    f"{snapshot.path} was not taken with the base model {base.path}",
                    hint="it holds what changed since then: set `model.base` to the model that the run began with",
                )
        shares = [float(share) for share in mix.shares]
        origin = origin_of(base, files[0].tensors)
        weights = {
            name: LazyTensor(torch.float32, info.shape, partial(_mixed, name, origin.get(name), files, shares))
            for name, info in files[0].tensors.items()
        }
        yield Rebuilt(std, step, used, mix, weights)


def _mixed(name: str, origin: LazyTensor | None, files: Sequence[TensorFile], shares: Sequence[float]) -> torch.Tensor:
    """One tensor, summed in float64. The shares add up to 1, so the base counts once."""
    shape = files[0].tensors[name].shape
    total = torch.zeros(shape, dtype=torch.float64) if origin is None else origin.load().to(torch.float64)
    for file, share in zip(files, shares, strict=True):
        total.add_(file.read(name), alpha=share)
    return total.to(torch.float32)
