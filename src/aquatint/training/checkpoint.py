"""Checkpoints that are whole or not there, and a resume that is exact.

A checkpoint is a folder `step-000500` with the trained weights, the optimizer's tensors, the moving average, the state,
and, last, `manifest.json` with size and SHA-256 of each file. It is written beside and renamed. Nothing else needs to be
saved: order and randomness are functions of the position.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from aquatint.errors import ResumeError
from aquatint.models.sdxl.shapes import is_text
from aquatint.optim.clipping import Clipping
from aquatint.optim.library_optimizer import LibraryOptimizer
from aquatint.optim.offload import settle
from aquatint.storage import atomic_folder, digest_file, remove_folder, remove_temporaries, storage_errors, write_json
from aquatint.tensor_file import LazyTensor, TensorFile, dtype_name, torch_dtype, write_tensors
from aquatint.training.adaptation import Adaptation
from aquatint.training.ema import Ema
from aquatint.training.free_average import FreeAverage
from aquatint.training.parallelize import trained_parameters
from aquatint.training.state import TrainState

SCHEMA = 1
_NAME = re.compile(r"step-(\d{6,})")


class Tabled(Protocol):
    """What a checkpoint is written from: tensors by name, in tables by the name of their file."""

    def tables(self) -> Mapping[str, Mapping[str, torch.Tensor]]: ...


class Savable(Tabled, Protocol):
    """Whatever a checkpoint can hold."""

    def fill_from(self, path: Path) -> None: ...


@dataclass(frozen=True)
class Trained:
    """The tensors of a run: the model, of which what requires gradients is trained and saved, its optimizer, and its average."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer | LibraryOptimizer
    ema: Ema | FreeAverage | None
    adaptation: Adaptation | None = None
    clipping: Clipping | None = None

    def weights(self) -> dict[str, dict[str, torch.nn.Parameter]]:
        """What is trained, by the name of its file. A run that trains no text encoder has no file of them."""
        tables: dict[str, dict[str, torch.nn.Parameter]] = {"unet": {}}
        for name, weight in trained_parameters(self.model).items():
            tables.setdefault("text_encoders" if is_text(name) else "unet", {})[name] = weight
        return tables

    def tables(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """What is saved, by the name of its file."""
        tables: dict[str, Mapping[str, torch.Tensor]] = {**self.weights(), "optimizer": optimizer_tensors(self)}
        if self.adaptation is not None:
            tables["loss"] = self.adaptation.tensors()
        if self.clipping is not None and self.clipping.state:
            tables["clipping"] = self.clipping.state
        return tables if self.ema is None else {**tables, **self.ema.tables()}

    def fill_from(self, path: Path) -> None:
        """Takes everything from a checkpoint. Raises ResumeError if it is of another model or optimizer."""
        for name, weights in self.weights().items():
            if name == "text_encoders" and not (path / "text_encoders.safetensors").exists():
                raise ResumeError(
                    f"{path} does not hold the text encoders that the config trains",
                    hint="set `text_encoders.train` back, or start another run, with run.name=... and a model.base that "
                    "`aquatint export` makes of this one",
                )
            fill(path / f"{name}.safetensors", weights)
        for name, average in self.ema.tables().items() if self.ema is not None else ():
            fill_average(path / f"{name}.safetensors", average)
        if self.adaptation is not None:
            fill(path / "loss.safetensors", self.adaptation.tensors())
        if self.clipping is not None and (path / "clipping.safetensors").exists():  # else it was clipped in another way before
            fill(path / "clipping.safetensors", self.clipping.state)
        restore_optimizer(path / "optimizer.safetensors", self)


def save(folder: Path, trained: Tabled, state: TrainState, *, plan_digest: str, keep: int, best_step: int | None = None) -> Path:
    """Saves under `folder/step-N`, then removes all but the newest `keep` and that of `best_step`.

    Raises StorageError; older ones stay whole.
    """
    path = folder / f"step-{state.step:06}"
    if not path.exists():
        with atomic_folder(path) as temporary:
            tables = trained.tables()
            files = {f"{name}.safetensors": write_tensors(temporary / f"{name}.safetensors", table) for name, table in tables.items()}
            write_json(temporary / "state.json", {"schema": SCHEMA, "plan_digest": plan_digest, "state": state.as_json()})
            files["state.json"] = digest_file(temporary / "state.json")
            entries = {name: {"sha256": digest, "bytes": (temporary / name).stat().st_size} for name, digest in files.items()}
            write_json(temporary / "manifest.json", {"schema": SCHEMA, "files": entries})
    for old in sorted_checkpoints(folder)[keep:]:
        if step_of(old) != best_step:
            remove_folder(old)
    return path


def step_of(path: Path) -> int:
    """The step that a checkpoint is of."""
    return int(path.name.removeprefix("step-"))


def sorted_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, newest first. Whether they are whole is another question: see `problem_of`."""
    found = [entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name)] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def problem_of(path: Path) -> str | None:
    """Why a checkpoint cannot be used, in a few words; None if every file has the size and digest of its manifest."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["schema"] != SCHEMA:
            return f"it was written in format {manifest['schema']}, this version reads format {SCHEMA}"
        for name, entry in manifest["files"].items():
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{name} has the wrong size"
            if digest_file(path / name) != entry["sha256"]:
                return f"{name} is damaged (its digest differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError) as error:
        return f"manifest.json is unreadable ({error})"
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint and a note on each newer one that is not. Raises ResumeError if all are damaged."""
    notes: list[str] = []
    candidates = sorted_checkpoints(folder)
    for path in candidates:
        problem = problem_of(path)
        if problem is None:
            return path, notes
        notes.append(f"skipped {path.name}: {problem}")
    if candidates:
        raise ResumeError(
            f"no checkpoint in {folder} can be used: " + "; ".join(notes),
            hint="restore one from a backup, or give the run another name to start anew",
        )
    return None, notes


def restore(path: Path, trained: Savable, *, plan_digest: str, accept_changes: bool = False) -> TrainState:
    """Fills `trained` from a checkpoint. Raises ResumeError if it is of another model, optimizer or picture set."""
    saved = json.loads((path / "state.json").read_text())
    if saved["plan_digest"] != plan_digest and not accept_changes:
        raise ResumeError(
            f"the pictures, captions or buckets are not those that {path} was trained on",
            hint="undo the change, or add --accept-changes to go on with the new data from here; "
            'a run from before large JPEGs were decoded at a fraction of their size goes on with data.decode = "whole"',
        )
    trained.fill_from(path)
    return TrainState(**saved["state"])


def fill_average(path: Path, average: Mapping[str, torch.Tensor]) -> None:
    """`fill` for an average, which a checkpoint may well be without. Raises ResumeError then."""
    if not path.exists():
        raise ResumeError(
            f"{path.parent} does not hold the average `{path.stem}` that the config asks for",
            hint="an average begins with its run: set the `ema` settings back, or give the run another name",
        )
    fill(path, average)


@torch.no_grad()
def fill(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Reads a file into tensors of the same names, shapes and dtypes. Raises ResumeError if they differ."""
    with storage_errors("read", path), TensorFile(path) as file:
        expected = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
        found = {name: (info.dtype, info.shape) for name, info in file.tensors.items()}
        if expected != found:
            different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise ResumeError(
                f"{path} does not fit this run: `{different[0]}` and {len(different) - 1} others differ in name, shape or number format",
                hint="continue with the same base model, precision, optimizer and groups, or give the run another name",
            )
        for name, tensor in tensors.items():
            if tensor.device.type == "cpu" and tensor.is_contiguous():
                file.read_into(name, tensor)
            else:
                tensor.copy_(file.read(name))


def optimizer_tensors(trained: Trained) -> dict[str, torch.Tensor]:
    """The optimizer's state as `parameter name/key` -> tensor. Every value of ours and of torch's AdamW is a tensor."""
    if isinstance(trained.optimizer, LibraryOptimizer):
        return trained.optimizer.tensors()
    settle(trained.optimizer)
    states = trained.optimizer.state
    return {
        f"{name}/{key}": value
        for name, parameter in trained_parameters(trained.model).items()
        for key, value in states.get(parameter, {}).items()
    }


def restore_optimizer(path: Path, trained: Trained) -> None:
    """Puts the saved state into the optimizer, dtypes untouched. Raises ResumeError if it is another optimizer's."""
    if isinstance(trained.optimizer, LibraryOptimizer):
        _restore_library_optimizer(path, trained.optimizer)
        return
    parameters = trained_parameters(trained.model)
    in_main_memory = getattr(trained.optimizer, "keeper", None) is not None
    fused = {p for group in trained.optimizer.param_groups if group.get("fused") for p in group["params"]}
    with storage_errors("read", path), TensorFile(path) as file:
        states: dict[str, dict[str, Any]] = {}
        for key in file.tensors:
            name, _, field = key.rpartition("/")
            if name not in parameters:
                raise ResumeError(f"{path} holds state of `{name}`, which is not trained here", hint="continue with the same base model")
            on_device = parameters[name] in fused if field == "step" else not in_main_memory  # torch's fused steps are on the device
            states.setdefault(name, {})[field] = file.read(key).to(parameters[name].device if on_device else "cpu")
    for name, state in states.items():
        trained.optimizer.state[parameters[name]] = state


def _restore_library_optimizer(path: Path, optimizer: LibraryOptimizer) -> None:
    with storage_errors("read", path), TensorFile(path) as file:
        try:
            optimizer.fill({key: partial(file.read, key) for key in file.tensors})
        except ValueError as error:
            hint = "continue with the same base model, optimizer and groups, or give the run another name"
            raise ResumeError(f"{path} does not fit this run: {error}", hint=hint) from error


def clean(folder: Path) -> None:
    """Removes what a crash left half-written. The caller holds the run's lock."""
    remove_temporaries(folder)


def lazy_weights(path: Path) -> dict[str, LazyTensor]:
    """A file's tensors, each read when its turn comes."""
    file = TensorFile(path)
    return {name: LazyTensor(torch_dtype(info.dtype), info.shape, partial(file.read, name)) for name, info in file.tensors.items()}
