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
from aquatint.data.batch import Batch
from aquatint.data.buckets import report_text
from aquatint.data.ledger import write_ledger
from aquatint.data.loader import BatchReader, Draws, stream
from aquatint.data.sampler import Order
from aquatint.errors import Interrupted
from aquatint.models.adapters import Frozen
from aquatint.models.sdxl.load import BaseModel, open_base
from aquatint.optim.clipping import Clipping
from aquatint.optim.create import create_optimizer, idle_steps
from aquatint.optim.fused import FusedBackward
from aquatint.optim.lr import learning_rate_factor
from aquatint.planning.groups import own_settings
from aquatint.planning.trained import check_groups, num_frozen, trainable_shapes, unet_dtype
from aquatint.storage import append_text, check_writable, folder_lock, shared_lock, write_json, write_text
from aquatint.tracking.curves import plot_losses
from aquatint.tracking.files import MetricsFile, truncate_after
from aquatint.tracking.tracker import Several, Tracker, guarded
from aquatint.training import checkpoint
from aquatint.training.adapting import adapting, check_start, tag_frequency
from aquatint.training.announce import announcement, captions_text
from aquatint.training.audit import Audit
from aquatint.training.breakdown import Breakdown, choose_breakdown
from aquatint.training.checkpoint import Trained
from aquatint.training.dry_step import as_in_training, try_step
from aquatint.training.ema import Ema, decay_of_half_life
from aquatint.training.ema_snapshots import remove_after, snapshot_action
from aquatint.training.layout import Layout
from aquatint.training.objective import Objective
from aquatint.training.objectives import (
    choose_adaptation,
    choose_densities,
    choose_objective,
    choose_process,
    mean_density,
    noise_kind,
)
from aquatint.training.online_text import encoded
from aquatint.training.overfit import Watch
from aquatint.training.parallelize import choose_device, ready_for_training, trained_parameters
from aquatint.training.prepare import Prepared, prepare
from aquatint.training.results import TAGS_FILE, export_weights, sample_request
from aquatint.training.resume import accept_base, accept_config
from aquatint.training.saver import Saver, share_of_memory
from aquatint.training.state import Every, TrainState
from aquatint.training.step import Parts
from aquatint.training.tasks import Action, Validation, log_action, sample_action, timings_action, validate_action
from aquatint.training.trainer import Run, Task, TrainResult, graceful_stop, train
from aquatint.training.validation import ValidationSet, validation_timesteps
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
    check_groups(config, base.spec)
    checkpoints = folder / "checkpoints"
    checkpoint.clean(checkpoints)
    latest, notes = checkpoint.newest(checkpoints)
    for note in notes:
        say(f"warning: {note}")
    accept_config(folder, dump(config), resuming=latest is not None, accept_changes=accept_changes, say=say)
    if num_frozen(config, base.spec):
        accept_base(folder, base.digest("unet"), resuming=latest is not None, accept_changes=accept_changes, say=say)
    if latest is None:
        check_start(config, base)
    data = prepare(config, base, say=say)
    describe(config, folder, data)
    parts, trained, total_steps = build_parts(config, base, objective, data, resuming=latest is not None)
    for line in announcement(config, data, parts, choose_process(config, base), trainable_shapes(config, base.spec)):
        say(line)
    state = TrainState() if latest is None else go_on(latest, trained, data, accept_changes=accept_changes)
    try_step(config, base.spec, data.layout, parts)
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
    run.has_ended, run.look_aside = lambda: watch.ended, saver.look
    looks = look_tasks(config, base, objective, data, run, tracker, watch)
    snapshots = snapshot_action(folder / "ema", trained.ema, base, display.note)
    run.tasks = build_tasks(config, data, run, tracker, looks, snapshots, saver)
    if state.step == 0:
        with as_in_training(config, base.spec, parts):
            for task in looks:
                task.run(state, None)  # type: ignore[arg-type]
        audit = Audit(parts, display.note, idle_steps(config.optimizer.name))
        run.tasks = (Task(audit, audit.run), *run.tasks)
    return Built(run, saver, trained, base, looks, samples_per_step(config), watch)


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


def build_parts(
    config: Config, base: BaseModel, objective: Objective, data: Prepared, *, resuming: bool = False
) -> tuple[Parts, Trained, int]:
    """The UNet ready for training, its optimizer and average, and the number of steps of the whole run."""
    device = choose_device(config.training.device)
    unet = base.load_unet(getattr(torch, unet_dtype(config)))
    adapt = adapting(config, base, resuming=resuming)
    own = own_settings(config, trainable_shapes(config, base.spec))
    frozen_parts = [name for name, group in own.items() if group.is_frozen]
    checkpointing = config.training.gradient_checkpointing
    model = ready_for_training(unet, gradient_checkpointing=checkpointing, device=device, adapt=adapt, frozen=frozen_parts)
    settings = config.optimizer.model_dump(exclude={"name"})
    optimizer = create_optimizer(config.optimizer.name, trained_parameters(model).items(), seed=config.run.seed, own=own, **settings)
    clipping = Clipping(config.training.clip, config.training.clip_norm, device=device)
    fused = FusedBackward(optimizer, clipping) if config.training.fused_backward else None
    ema = build_ema(config, model, data.samples_per_epoch)
    frozen = None
    if objective.mask_prior_weight > 0 and data.train.has_masks:
        half = torch.bfloat16 if config.training.precision != "fp32" else torch.float32
        frozen = Frozen(model) if adapt is not None else base.load_unet(half).requires_grad_(False).to(device)
    drawn = mean_density(choose_densities(config, base, data.layout.plan.shapes), bucket_samples(data.layout))
    adaptation = choose_adaptation(config, objective, drawn, device)
    lengths = {"samples_per_step": samples_per_step(config), "samples_per_epoch": data.samples_per_epoch}
    total_steps = config.training.length.in_steps(**lengths)
    warmup_steps, reference_steps = config.lr.warmup.in_steps(**lengths), config.lr.reference.in_steps(**lengths)

    def learning_rate(step: int) -> float:
        factor = learning_rate_factor(
            step, schedule=config.lr.schedule, warmup_steps=warmup_steps, total_steps=total_steps, end_factor=config.lr.end_factor,
            reference_steps=reference_steps,
        )  # fmt: skip
        return config.optimizer.learning_rate * factor

    autocast = config.training.precision == "bf16_mixed"
    parts = Parts(model, optimizer, ema, objective, learning_rate, autocast, clipping, device, adaptation, frozen, fused)
    return parts, Trained(model, optimizer, ema, adaptation, clipping), total_steps


def build_ema(config: Config, model: torch.nn.Module, samples_per_epoch: int) -> Ema | None:
    """The averages of the weights, if the config asks for them."""
    section, decay, per_step = config.ema, config.ema.decay, samples_per_step(config)
    if not section.enabled:
        return None
    if section.half_life is not None:
        half_life = section.half_life.in_samples(samples_per_step=per_step, samples_per_epoch=samples_per_epoch)
        decay = decay_of_half_life(half_life, per_step)
    device = torch.device("cpu") if section.device == "cpu" else None
    settings: dict[str, Any] = {"warmup": section.warmup, "device": device, "power_stds": section.power_stds}
    return Ema(trained_parameters(model), decay=decay, samples_per_step=per_step, **settings)


def samples_per_step(config: Config) -> int:
    return config.training.batch_size * config.training.accumulation_steps


def build_reader(config: Config, base: BaseModel, data: Prepared) -> BatchReader:
    order = Order(config.run.seed, data.layout.groups, config.training.batch_size)
    draws = Draws(
        config.run.seed, samples_per_step(config), flip_prob=config.crop.flip_prob, dropout_prob=config.captions.dropout_prob,
        dropout_zeros_share=config.captions.dropout_zeros_share, noise=noise_kind(config), spread=config.timesteps.spread,
        densities=choose_densities(config, base, data.layout.plan.shapes),
    )  # fmt: skip
    return BatchReader(data.entries, data.train, order, draws, policies=data.layout.policies, drop_probs=data.layout.drop_probs)


def batches_from(config: Config, base: BaseModel, reader: BatchReader, state: TrainState, total_steps: int) -> Generator[Batch]:
    """The batches that are still to come: their numbers follow from the samples seen."""
    start = state.samples_seen // config.training.batch_size
    end = total_steps * config.training.accumulation_steps
    device = choose_device(config.training.device)
    batches = stream(reader, start, end, workers=config.loader.workers, prefetch=config.loader.prefetch, pin=device.type == "cuda")
    return batches if reader.samples.captions is None else encoded(batches, base.caption_encoder(device))


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


def build_validation(config: Config, objective: Objective, data: Prepared, folder: Path) -> Validation:
    """The pictures that are measured, and the noise levels."""
    section, terminal = config.validation, objective.schedule.zero_terminal_snr  # flows end there too
    timesteps = validation_timesteps(section.timesteps, config.timesteps.lowest, config.timesteps.highest, terminal=terminal)
    held_out, known = (ValidationSet(data.entries, side, timesteps, config.training.batch_size) for side in (data.held_out, data.known))
    kinds = ("trained" if data.layout.held_out_is_trained else "held out", "trained")
    return Validation(held_out, known, folder / "worst.txt", section.worst, kinds)


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
        entries = {prompt: data.stores.texts.read(key) for prompt, key in data.layout.prompts.items()}
        embeds = {prompt: (entry["prompt_embeds"], entry["pooled"]) for prompt, entry in entries.items()}
        size_hw = most_trained_size(data.layout)
        request = replace(sample_request(config, base, objective, run.parts.device, embeds, size_hw), autocast=run.parts.autocast)
        request = replace(request, averaged=config.samples.weights == "average")
        every = Every(config.samples.every, data.samples_per_epoch)
        tasks.append(Task(every, sample_action(run.parts, request, run.folder / "samples", tracker, run.display)))
    return tuple(tasks)


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


def most_trained_size(layout: Layout) -> tuple[int, int]:
    """Height and width of the bucket that most samples come from, in pixels."""
    height, width = layout.plan.shapes[int(np.argmax(bucket_samples(layout)))].tolist()
    return height, width


def bucket_samples(layout: Layout) -> list[float]:
    """How many samples of an epoch come from each bucket."""
    return [sum(group.count * float(group.repeats) for group in groups) for groups in layout.groups]


def environment() -> dict[str, Any]:
    """Versions that a result may depend on."""
    import diffusers
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "aquatint": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "diffusers": diffusers.__version__, "transformers": transformers.__version__, "gpu": gpu,
    }  # fmt: skip
