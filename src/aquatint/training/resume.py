"""Whether a run may go on with a config that is not the one it began with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aquatint.errors import ResumeError
from aquatint.storage import write_json

# These change nothing of what is trained. The pictures themselves are compared by content, whatever their path.
FREE = (
    "run.folder", "model.base", "model.vae", "data.", "cache.", "loader.", "validation.", "samples.", "checkpoints.", "export.",
    "tracking.", "training.length", "training.device", "training.max_bad_steps", "training.dry_step", "vae_training.", "evaluation.",
    "ema.snapshot_every", "adapter.start_from", "memory.swapped_blocks", "memory.optimizer_state",
)  # fmt: skip
STATEFUL = ("optimizer.name", "optimizer.rounding", "optimizer.max_precond_dim")  # these say what an optimizer keeps


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= flatten(item, f"{prefix}{name}.") if isinstance(item, dict) else {f"{prefix}{name}": item}
    return flat


def decides_training(name: str) -> bool:
    """Whether the UNet's training depends on a setting."""
    return not name.startswith(FREE)


def changes(old: Mapping[str, Any], new: Mapping[str, Any], decides: Callable[[str], bool] = decides_training) -> list[str]:
    """The settings that decide the training and differ, as `name: old -> new`."""
    before, after = flatten(old), flatten(new)
    different = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return [f"{name}: {before.get(name)} -> {after.get(name)}" for name in different if decides(name)]


def accept_config(
    folder: Path,
    new: Mapping[str, Any],
    *,
    resuming: bool,
    accept_changes: bool,
    say: Callable[[str], None],
    decides: Callable[[str], bool] = decides_training,
) -> None:
    """Compares the config with the run's own. Raises ResumeError for a change that was not asked for with a flag, or cannot be made."""
    path = folder / "config.json"
    if not resuming or not path.exists():
        return
    found = changes(json.loads(path.read_text()), new, decides)
    if found and not accept_changes:
        raise ResumeError(
            f"the run in {folder} was started with other settings: " + "; ".join(found),
            hint="set them back, add --accept-changes to go on with the new ones, or start another run with run.name=...",
        )
    if other := [change for change in found if change.startswith(STATEFUL)]:
        raise ResumeError(
            f"what the optimizer has gathered in {folder} is of no use with another: " + "; ".join(other),
            hint="set it back, or start another run, with run.name=... and a model.base that `aquatint export` makes of this one",
        )
    for change in found:
        say(f"changed: {change}")


def accept_base(folder: Path, digest: str, *, resuming: bool, accept_changes: bool, say: Callable[[str], None]) -> None:
    """Keeps the digest of the UNet that frozen weights come from: checkpoints do not hold them. Raises ResumeError for another one."""
    path = folder / "base.json"
    if resuming and path.exists() and json.loads(path.read_text())["unet"] != digest:
        if not accept_changes:
            raise ResumeError(
                f"`model.base` is not the model that the run in {folder} began with, and what is frozen comes from there",
                hint="set it back, add --accept-changes to go on with the new one, or start another run with run.name=...",
            )
        say("changed: the model that frozen weights come from")
    write_json(path, {"unet": digest})
