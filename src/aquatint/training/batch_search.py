"""`training.batch_size = "auto"`: as many pictures at once as the memory holds, found when a run begins and kept for all of its life."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from aquatint.config.schema import Config
from aquatint.errors import ResumeError, UsageError
from aquatint.models.sdxl.model import ModelSpec
from aquatint.planning.batch import batch_sizes, is_open, largest_batch_size, with_batch_size
from aquatint.planning.memory import gib
from aquatint.training.dry_step import lack_of_memory
from aquatint.training.layout import Layout
from aquatint.training.main_memory import held_bytes, spare_bytes
from aquatint.training.step import Parts
from aquatint.utils.progress import say


def as_begun(config: Config, folder: Path, *, resuming: bool) -> Config:
    """The config with the batch size that the run in `folder` found when it began, however much memory is free now.

    Raises ResumeError if the folder does not say it any more.
    """
    path = folder / "config.json"
    if not (resuming and is_open(config)):
        return config
    if not path.exists():
        raise ResumeError(
            f'{path} is missing, and with it the batch size that `training.batch_size = "auto"` found when the run began',
            hint="set `training.batch_size` and `training.accumulation_steps` to what the line `batch size` of run.log says",
        )
    size = json.loads(path.read_text())["training"]["batch_size"]
    return with_batch_size(config, size) if size in batch_sizes(config.training.per_step) else config


def settle(config: Config, spec: ModelSpec, layout: Layout, parts: Parts) -> Config:
    """The config with a number for its batch size: the largest that the plan sees room for, or less if a dry step runs out of memory.

    Raises UsageError where the system does not tell how much memory is free.
    """
    if not is_open(config):
        return config
    free = free_bytes(parts.device)
    guess = largest_batch_size(config, spec, free)
    sizes = [size for size in batch_sizes(config.training.per_step) if size <= guess]
    while len(sizes) > 1 and (reason := lack_of_memory(with_batch_size(config, sizes[0]), spec, layout, parts)):
        say(f"batch size  {sizes.pop(0)} at once do not fit ({reason})")
    found = with_batch_size(config, sizes[0])
    passes = found.training.accumulation_steps
    say(f"batch size  {sizes[0]} at once, {passes} pass{'' if passes == 1 else 'es'} a step; {gib(free)} are free, for {guess} by the plan")
    return found


def free_bytes(device: torch.device) -> int:
    """The memory that a run can have, with what it holds already. Raises UsageError."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    spare, held = spare_bytes(), held_bytes()
    if spare is None or held is None:
        raise UsageError(
            '`training.batch_size = "auto"` needs to know how much main memory is free, and this system does not tell',
            hint="set `training.batch_size` to a number",
        )
    return spare + held
