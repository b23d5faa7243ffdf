"""From a config to what is done between steps, and when: logs, validation, sample pictures, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from aquatint.config.schema import Config
from aquatint.config.text_rules import trains_text
from aquatint.models.sdxl.load import BaseModel
from aquatint.tracking.tracker import Tracker
from aquatint.training.build_parts import bucket_samples
from aquatint.training.layout import Layout
from aquatint.training.objective import Objective
from aquatint.training.overfit import Watch
from aquatint.training.prepare import Prepared
from aquatint.training.results import sample_request
from aquatint.training.sampling import Encode, looked_up
from aquatint.training.saver import Saver
from aquatint.training.state import Every
from aquatint.training.step import Parts
from aquatint.training.tasks import Action, Validation, log_action, sample_action, timings_action, validate_action
from aquatint.training.trainer import Run, Task
from aquatint.training.validation import ValidationSet, validation_timesteps


def build_tasks(
    config: Config, data: Prepared, run: Run, tracker: Tracker, looks: tuple[Task, ...], snapshots: Action, saver: Saver
) -> tuple[Task, ...]:
    """All tasks, in the order in which they are done."""
    log_every = Every(config.tracking.log_every, data.samples_per_epoch)
    return (
        Task(log_every, log_action(tracker)),
        Task(log_every, timings_action(run.folder / "timings.jsonl")),
        *looks,
        Task(Every(config.ema.snapshot_every, data.samples_per_epoch), snapshots),
        Task(Every(config.checkpoints.every, data.samples_per_epoch), saver),
        Task(Every(config.validation.every, data.samples_per_epoch), saver.save_best),
    )


def look_tasks(
    config: Config, base: BaseModel, objective: Objective, data: Prepared, run: Run, tracker: Tracker, watch: Watch
) -> tuple[Task, ...]:
    """The tasks that look at the model: validation and sample pictures."""
    tasks = []
    if config.validation.every is not None:
        chosen = build_validation(config, objective, data, run.folder)
        every = Every(config.validation.every, data.samples_per_epoch)
        tasks.append(Task(every, validate_action(run.parts, chosen, tracker, run.display, watch)))
    if config.samples.every is not None and config.samples.prompts:
        size_hw, encode = most_trained_size(data.layout), prompt_encoder(run.parts, data)
        request = replace(sample_request(config, base, objective, run.parts.device, encode, size_hw), autocast=run.parts.autocast)
        request = replace(request, averaged=config.samples.weights == "average")
        every = Every(config.samples.every, data.samples_per_epoch)
        tasks.append(Task(every, sample_action(run.parts, request, run.folder / "samples", tracker, run.display)))
    return tuple(tasks)


def build_validation(config: Config, objective: Objective, data: Prepared, folder: Path) -> Validation:
    """The pictures that are measured, and the noise levels."""
    section, terminal = config.validation, objective.schedule.zero_terminal_snr  # flows end there too
    timesteps = validation_timesteps(section.timesteps, config.timesteps.lowest, config.timesteps.highest, terminal=terminal)
    held_out, known = (
        ValidationSet(data.entries, side.samples, timesteps, config.training.at_once, side.texts if trains_text(config) else None)
        for side in (data.layout.held_out, data.layout.known)
    )
    kinds = ("trained" if data.layout.held_out_is_trained else "held out", "trained")
    return Validation(held_out, known, folder / "worst.txt", section.worst, kinds)


def prompt_encoder(parts: Parts, data: Prepared) -> Encode:
    """Prompts as they are cached, or, if a text encoder is trained, as it reads them when pictures are made."""
    if parts.texts is not None:
        return parts.texts.encode
    entries = {prompt: data.stores.texts.read(key) for prompt, key in data.layout.prompts.items()}
    return looked_up({prompt: (entry["prompt_embeds"], entry["pooled"]) for prompt, entry in entries.items()})


def most_trained_size(layout: Layout) -> tuple[int, int]:
    """Height and width of the bucket that most samples come from, in pixels."""
    height, width = layout.plan.shapes[int(np.argmax(bucket_samples(layout)))].tolist()
    return height, width
