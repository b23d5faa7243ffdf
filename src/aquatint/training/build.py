"""The composition root: a config in, a run out. Below this module and `prepare`, nothing knows what a config is."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aquatint import __version__
from aquatint.config.schema import Config, dump
from aquatint.config.text_rules import trains_text
from aquatint.data.batch import Batch
from aquatint.data.buckets import report_text
from aquatint.data.ledger import write_ledger
from aquatint.data.loader import BatchReader, Draws, stream
from aquatint.data.sampler import Order
from aquatint.errors import Interrupted
from aquatint.models.sdxl.load import BaseModel, open_base
from aquatint.optim.create import idle_steps
from aquatint.optim.library import check_installed
from aquatint.planning.trained import check_groups, num_frozen, trainable_shapes
from aquatint.storage import append_text, check_writable, folder_lock, shared_lock, write_json, write_text
from aquatint.tracking.curves import plot_losses
from aquatint.tracking.files import MetricsFile, truncate_after
from aquatint.tracking.tracker import Several, Tracker, guarded
from aquatint.training import checkpoint
from aquatint.training.adapting import check_start, tag_frequency
from aquatint.training.announce import announcement, captions_text
from aquatint.training.audit import Audit
from aquatint.training.batch_search import as_begun, settle
from aquatint.training.breakdown import Breakdown, choose_breakdown
from aquatint.training.build_parts import build_parts
from aquatint.training.build_tasks import build_tasks, look_tasks
from aquatint.training.checkpoint import Trained
from aquatint.training.compiling import CompileClock
from aquatint.training.dry_step import as_in_training, try_step
from aquatint.training.ema_snapshots import remove_after, snapshot_action
from aquatint.training.layout import plan_digest
from aquatint.training.objectives import choose_densities, choose_objective, choose_process, noise_kind
from aquatint.training.online_text import encoded
from aquatint.training.overfit import Watch
from aquatint.training.parallelize import choose_device, trained_parameters
from aquatint.training.prepare import Prepared, prepare
from aquatint.training.results import TAGS_FILE, export_weights
from aquatint.training.resume import accept_base, accept_config
from aquatint.training.saver import Saver, share_of_memory
from aquatint.training.state import TrainState
from aquatint.training.trainer import Run, Task, TrainResult, graceful_stop, train
from aquatint.utils.logging import logged
from aquatint.utils.progress import Progress, say


def train_run(config: Config, *, accept_changes: bool = False) -> TrainResult:
    """Trains, or goes on training, and exports at the end. Raises AquatintError; Interrupted after a requested stop."""
    folder = config.run.folder / config.run.name
    check_writable(folder)
    check_writable(config.cache.folder)
    with (
        folder_lock(folder),
        shared_lock(config.cache.folder),
        logged(partial(append_text, folder / "run.log")),
        contextlib.ExitStack() as stack,
    ):
        built = build_run(config, folder, stack, accept_changes=accept_changes)
        stop = stack.enter_context(graceful_stop())
        result = train(built.run, stop)
        if not result.stopped:
            built.look_at_the_end(result.state)
            snapshot_action(folder / "ema", built.trained.ema, built.base, say)(result.state)
        built.saver.save(result.state)
        if result.stopped:
            raise Interrupted(
                f"stopped at step {result.state.step} of {built.run.total_steps}; everything is saved in {folder}",
                hint="run the same command again to go on exactly there",
            )
        if result.state.step < built.run.total_steps and (words := built.watch.closing_words(built.saver.steps())):
            say(words)
    weights = built.trained.ema.average if built.trained.ema is not None else trained_parameters(built.trained.model)
    exported = export_weights(config, built.base, weights, folder / "export" / config.run.name, config.export)
    plot_losses(folder / "metrics.jsonl", folder / "loss.png")
    return TrainResult(result.state, folder, stopped=False, exported=exported)


@dataclass
class Built:
    """A run and what `train_run` needs around it."""

    run: Run
    saver: Saver
    trained: Trained
    base: BaseModel
    looks: tuple[Task, ...]
    samples_per_step: int
    watch: Watch

    def look_at_the_end(self, state: TrainState) -> None:
        """Validation and sample pictures of the last step, unless the loop did them, or an earlier process of a finished run."""
        if state.step == self.run.state.step:
            return
        before = TrainState(state.step - 1, state.samples_seen - self.samples_per_step)
        for task in self.looks:
            if not task.every.due(before, state):
                task.run(state, None)  # type: ignore[arg-type]


def build_run(config: Config, folder: Path, stack: contextlib.ExitStack, *, accept_changes: bool) -> Built:
    """Puts a run together, from its checkpoint if there is one. What must be closed goes on `stack`."""
    base = open_base(config.model.base, config.model.vae)
    objective = choose_objective(config, base)
    checkpoints = folder / "checkpoints"
    latest = last_checkpoint(checkpoints)
    config = accepted(config, base, folder, resuming=latest is not None, accept_changes=accept_changes)
    data = prepare(config, base, say=say)
    parts, trained, total_steps = build_parts(config, base, objective, data, resuming=latest is not None)
    config = settle(config, base.spec, data.layout, parts)
    data = replace(data, digest=plan_digest(config, data.layout))
    describe(config, folder, data)
    for line in announcement(config, data, parts, choose_process(config, base), trainable_shapes(config, base.spec)):
        say(line)
    state = TrainState() if latest is None else go_on(latest, trained, data, accept_changes=accept_changes)
    clock = CompileClock(compiles=config.speed.compile != "none")
    try_step(config, base.spec, data.layout, parts)
    clock.look(say)
    remove_after(folder / "ema", state.step)
    tracker = stack.enter_context(contextlib.closing(open_trackers(config, folder, state.step)))
    display = stack.enter_context(Progress(total_steps, state.step))
    reader = build_reader(config, base, data)
    run = Run(
        folder=folder,
        parts=parts,
        state=state,
        stream=lambda state: batches_from(config, base, reader, state, total_steps),
        accumulation_steps=config.training.accumulation_steps,
        total_steps=total_steps,
        max_bad_steps=config.training.max_bad_steps,
        tasks=(),
        display=display,
        breakdown=build_breakdown(data),
    )
    metrics = folder / "metrics.jsonl"
    share = share_of_memory(config.checkpoints.background, parts.device)
    saver = stack.enter_context(Saver(checkpoints, trained, data.digest, config.checkpoints.keep, display, memory_share=share))
    saver.metrics = metrics if config.checkpoints.keep_best else None
    watch = build_watch(config, metrics, data, display)
    run.has_ended, run.look_aside = lambda: watch.ended, partial(look_aside, saver, clock, display)
    looks = look_tasks(config, base, objective, data, run, tracker, watch)
    snapshots = snapshot_action(folder / "ema", trained.ema, base, display.note)
    run.tasks = build_tasks(config, data, run, tracker, looks, snapshots, saver)
    if state.step == 0:
        with as_in_training(config, base.spec, parts):
            for task in looks:
                task.run(state, None)  # type: ignore[arg-type]
        audit = Audit(parts, display.note, idle_steps(config.optimizer.name))
        run.tasks = (Task(audit, audit.run), *run.tasks)
    return Built(run, saver, trained, base, looks, config.training.per_step, watch)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; what a crash left half-written is removed. Raises ResumeError if none of several is."""
    checkpoint.clean(folder)
    latest, notes = checkpoint.newest(folder)
    for note in notes:
        say(f"warning: {note}")
    return latest


def accepted(config: Config, base: BaseModel, folder: Path, *, resuming: bool, accept_changes: bool) -> Config:
    """The config as its run began, if that decided something by itself. Raises AquatintError where it does not suit run or base."""
    check_groups(config, base.spec)
    check_installed(config.optimizer.name)
    config = as_begun(config, folder, resuming=resuming)
    accept_config(folder, dump(config), resuming=resuming, accept_changes=accept_changes, say=say)
    if num_frozen(config, base.spec):
        accept_base(folder, base.digest("unet"), resuming=resuming, accept_changes=accept_changes, say=say)
    if not resuming:
        check_start(config, base)
    return config


def look_aside(saver: Saver, clock: CompileClock, display: Progress) -> None:
    """What goes on beside the loop: saving, and compiling."""
    saver.look()
    clock.look(display.note)


def describe(config: Config, folder: Path, data: Prepared) -> None:
    """Writes what a run folder says of its run: pictures, buckets, captions, the whole config, versions."""
    write_ledger(data.manifest, folder)
    write_text(folder / "buckets.txt", report_text(data.layout.report))
    write_text(folder / "captions.txt", captions_text(data.layout))
    if config.adapter.kind != "none":
        write_json(folder / TAGS_FILE, tag_frequency(data.layout))
    write_json(folder / "config.json", dump(config))
    write_json(folder / "environment.json", environment())


def go_on(latest: Path, trained: Trained, data: Prepared, *, accept_changes: bool) -> TrainState:
    """Fills everything that is trained from a checkpoint. Raises ResumeError."""
    state = checkpoint.restore(latest, trained, plan_digest=data.digest, accept_changes=accept_changes)
    say(f"going on from {latest.name}, {state.samples_seen} pictures seen")
    if trained.ema is not None:
        trained.ema.start_at(state.step, state.samples_seen)
    return state


def build_breakdown(data: Prepared) -> Breakdown:
    """What training losses are told apart by."""
    groups = data.layout.groups
    return choose_breakdown(sum(map(bool, groups)), len(np.unique(data.train.sources)))


def build_watch(config: Config, metrics: Path, data: Prepared, display: Progress) -> Watch:
    """What ends a run early, or not. It looks back at what a resumed run measured."""
    section = config.validation
    stop_after = section.stop_after
    if stop_after and data.layout.held_out_is_trained:
        say("warning: no picture could be held out, so validation.stop_after will not end this run")
        stop_after = 0
    watch = Watch(metrics, section.overfit_after, stop_after, display.note)
    watch.decide()
    return watch


def build_reader(config: Config, base: BaseModel, data: Prepared) -> BatchReader:
    order = Order(config.run.seed, data.layout.groups, config.training.at_once)
    draws = Draws(
        config.run.seed, config.training.per_step, flip_prob=config.crop.flip_prob, dropout_prob=config.captions.dropout_prob,
        dropout_zeros_share=config.captions.dropout_zeros_share, noise=noise_kind(config), spread=config.timesteps.spread,
        densities=choose_densities(config, base, data.layout.plan.shapes),
    )  # fmt: skip
    return BatchReader(data.entries, data.train, order, draws, policies=data.layout.policies, drop_probs=data.layout.drop_probs)


def batches_from(config: Config, base: BaseModel, reader: BatchReader, state: TrainState, total_steps: int) -> Generator[Batch]:
    """The batches that are still to come: their numbers follow from the samples seen."""
    start = state.samples_seen // config.training.at_once
    end = total_steps * config.training.accumulation_steps
    device = choose_device(config.training.device)
    batches = stream(reader, start, end, workers=config.loader.workers, prefetch=config.loader.prefetch, pin=device.type == "cuda")
    if reader.samples.captions is None or trains_text(config):
        return batches
    return encoded(batches, base.caption_encoder(device))


def open_trackers(config: Config, folder: Path, step: int) -> Tracker:
    """The metrics file, cut back to `step`, and the trackers that the config asks for."""
    section = config.tracking
    truncate_after(folder / "metrics.jsonl", step)
    truncate_after(folder / "timings.jsonl", step)
    trackers: list[Tracker] = [MetricsFile(folder / "metrics.jsonl")]
    if section.tensorboard:
        from aquatint.tracking.tensorboard import TensorBoardTracker

        trackers.append(guarded("TensorBoard", lambda: TensorBoardTracker(folder / "tensorboard", start_step=step), say))
    if section.wandb.enabled:
        trackers.append(guarded("W&B", lambda: open_wandb(config, folder), say))
    return Several(trackers)


def open_wandb(config: Config, folder: Path) -> Tracker:
    from aquatint.tracking.wandb import WandbTracker

    section = config.tracking.wandb
    return WandbTracker(
        folder, project=section.project, entity=section.entity, mode=section.mode, name=config.run.name, config=dump(config)
    )


def environment() -> dict[str, Any]:
    """Versions that a result may depend on."""
    import diffusers
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "aquatint": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "diffusers": diffusers.__version__, "transformers": transformers.__version__, "gpu": gpu,
    }  # fmt: skip
