"""The composition root of `aquatint train-vae`: a config in, a run of its own beside the UNet's out."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from aquatint.config.schema import Config, dump
from aquatint.data.image import quiet_decoders
from aquatint.data.ledger import write_ledger
from aquatint.data.manifest import Manifest, by_content, split
from aquatint.data.sampler import Order
from aquatint.errors import DataError, Interrupted
from aquatint.models.patchgan import build_discriminator
from aquatint.models.perceptual import load_perceptual
from aquatint.models.recompute import recompute
from aquatint.models.sdxl.export import export_decoder, export_vae, modelspec_metadata
from aquatint.models.sdxl.load import BaseModel, open_base
from aquatint.optim.lr import learning_rate_factor
from aquatint.planning.sources import repeats_of
from aquatint.storage import append_text, check_writable, folder_lock, shared_lock, write_json
from aquatint.tracking.curves import plot_losses
from aquatint.tracking.tracker import Tracker
from aquatint.training import checkpoint
from aquatint.training.build import environment, open_trackers
from aquatint.training.dry_step import wants_dry_step
from aquatint.training.ema import Ema
from aquatint.training.find import find_pictures, opener_of, read_quarantine
from aquatint.training.parallelize import choose_device
from aquatint.training.resume import accept_config
from aquatint.training.saver import Saver, share_of_memory
from aquatint.training.state import Every, TrainState
from aquatint.training.tasks import timings_action
from aquatint.training.trainer import Run, Task, TrainResult, graceful_stop, train
from aquatint.training.vae_dry_step import try_vae_step
from aquatint.training.vae_looks import MAX_SHOWN, Sheet, decoded, log_action, sheet_action, validate_action
from aquatint.training.vae_pictures import CropReader, CropStream, PictureBatch, by_source
from aquatint.training.vae_step import Adversary, DecoderLoss, VaeParts, trained_parts, vae_step
from aquatint.utils.logging import logged
from aquatint.utils.progress import Progress, say
from aquatint.utils.seeds import seed_of

BETAS = (0.9, 0.999)
DISCRIMINATOR_BETAS = (0.5, 0.9)  # what VQGAN's is trained with: a longer memory makes the two chase each other
FREE = ("length", "validation_every", "samples_every", "checkpoints_every")  # of `vae_training`: they change nothing that is learned
ALSO = ("run.seed", "data.alpha_color", "buckets.resolution", "training.clip_norm")


def train_vae_run(config: Config, *, accept_changes: bool = False) -> TrainResult:
    """Trains the decoder, or goes on, and exports at the end. Raises AquatintError; Interrupted after a requested stop."""
    folder = config.run.folder / f"{config.run.name}-vae"
    check_writable(folder)
    check_writable(config.cache.folder)
    with (
        folder_lock(folder),
        shared_lock(config.cache.folder),
        logged(partial(append_text, folder / "run.log")),
        quiet_decoders(),
        contextlib.ExitStack() as stack,
    ):
        built = build_vae_run(config, folder, stack, accept_changes=accept_changes)
        stop = stack.enter_context(graceful_stop())
        result = train(built.run, stop)
        if not result.stopped:
            built.look_at_the_end(result.state)
        built.saver.save(result.state)
        if result.stopped:
            raise Interrupted(
                f"stopped at step {result.state.step} of {built.run.total_steps}; everything is saved in {folder}",
                hint="run the same command again to go on exactly there",
            )
    exported = export_trained(config, built.base, built.parts, folder / "export")
    plot_losses(folder / "metrics.jsonl", folder / "loss.png", validation="val_l1")
    return TrainResult(result.state, folder, stopped=False, exported=exported)


@dataclass
class VaeBuilt:
    """A run and what `train_vae_run` needs around it."""

    run: Run
    parts: VaeParts
    saver: Saver
    base: BaseModel
    looks: tuple[Task, ...]

    def look_at_the_end(self, state: TrainState) -> None:
        """Numbers and pictures of the last step, unless the loop made them, or an earlier process of a finished run."""
        if state.step == self.run.state.step:
            return
        before = TrainState(state.step - 1, state.samples_seen - state.samples_seen // state.step)
        for task in self.looks:
            if not task.every.due(before, state):
                task.run(state, None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class VaeData:
    """The pictures. `held_out` are batches to measure on."""

    manifest: Manifest
    stream: CropStream
    held_out: tuple[npt.NDArray[np.int64], ...]
    samples_per_epoch: int

    def batches(self) -> list[PictureBatch]:
        return [self.stream.reader.fixed(list(self.manifest.pictures(rows))) for rows in self.held_out]

    def shown(self) -> PictureBatch:
        rows = np.concatenate(self.held_out)[:MAX_SHOWN]
        return self.stream.reader.fixed(list(self.manifest.pictures(rows)))


def build_vae_run(config: Config, folder: Path, stack: contextlib.ExitStack, *, accept_changes: bool) -> VaeBuilt:
    """Puts a run together, from its checkpoint if there is one. What must be closed goes on `stack`."""
    section = config.vae_training
    base = open_base(config.model.base, config.model.vae)
    loss = build_loss(config)
    checkpoints = folder / "checkpoints"
    checkpoint.clean(checkpoints)
    latest, notes = checkpoint.newest(checkpoints)
    for note in notes:
        say(f"warning: {note}")
    accept_config(folder, dump(config), resuming=latest is not None, accept_changes=accept_changes, say=say, decides=decides)
    data = find_data(config)
    write_ledger(data.manifest, folder)
    write_json(folder / "config.json", dump(config))
    write_json(folder / "environment.json", environment())
    lengths = {"samples_per_step": section.batch_size, "samples_per_epoch": data.samples_per_epoch}
    total_steps = section.length.in_steps(**lengths)
    parts = build_parts(config, base, loss, lengths)
    if wants_dry_step(config, parts.device):
        try_vae_step(parts, section.batch_size, section.resolution)
    shown = data.shown()
    sheet = Sheet(shown, decoded(parts, shown))  # with the base's own decoder, whatever a checkpoint has
    digest = hashlib.sha256(f"{data.stream.digest} {base.digest('vae')}".encode()).hexdigest()
    state = TrainState()
    if latest is not None:
        state = checkpoint.restore(latest, parts, plan_digest=digest, accept_changes=accept_changes)
        say(f"going on from {latest.name}, {state.samples_seen} crops seen")
    named = config.model_copy(update={"run": config.run.model_copy(update={"name": folder.name})})
    tracker = stack.enter_context(contextlib.closing(open_trackers(named, folder, state.step)))
    display = stack.enter_context(Progress(total_steps, state.step))
    share = share_of_memory(config.checkpoints.background, parts.device)
    saver = stack.enter_context(Saver(checkpoints, parts, digest, config.checkpoints.keep, display, memory_share=share))
    looks = (
        Task(Every(section.validation_every, data.samples_per_epoch), validate_action(parts, data.batches, tracker, display)),
        Task(Every(section.samples_every, data.samples_per_epoch), sheet_action(parts, sheet, folder / "samples", tracker)),
    )
    run = Run(
        folder=folder, parts=parts, state=state,  # type: ignore[arg-type]
        stream=lambda state: data.stream.batches(
            state.step, total_steps, workers=config.loader.workers, prefetch=config.loader.prefetch
        ),  # type: ignore[arg-type,return-value]
        accumulation_steps=1, total_steps=total_steps, max_bad_steps=config.training.max_bad_steps,
        tasks=build_tasks(config, data, folder, tracker, looks, saver), display=display,
        step=vae_step, rate_setting="vae_training.learning_rate", look_aside=saver.look,
    )  # fmt: skip
    if state.step == 0:
        for task in looks:
            task.run(state, None)  # type: ignore[arg-type]
    return VaeBuilt(run, parts, saver, base, looks)


def decides(name: str) -> bool:
    """Whether the decoder's training depends on a setting."""
    section, _, setting = name.partition(".")
    return name in ALSO or (section == "vae_training" and setting not in FREE)


def build_tasks(config: Config, data: VaeData, folder: Path, tracker: Tracker, looks: tuple[Task, ...], saver: Saver) -> tuple[Task, ...]:
    """All tasks, in the order in which they are done."""
    log_every = Every(config.tracking.log_every, data.samples_per_epoch)
    return (
        Task(log_every, log_action(tracker)),
        Task(log_every, timings_action(folder / "timings.jsonl")),
        *looks,
        Task(Every(config.vae_training.checkpoints_every, data.samples_per_epoch), saver),
    )


def build_loss(config: Config) -> DecoderLoss:
    """Raises ModelFileError for a perceptual model that is none."""
    section = config.vae_training
    perceptual = None
    if section.perceptual_model is not None:
        perceptual = load_perceptual(section.perceptual_model, choose_device(config.training.device))
    else:
        say("no vae_training.perceptual_model: fine texture gets softer when pixels are all that is compared")
    return DecoderLoss(section.l1_weight, section.mse_weight, section.perceptual_weight, perceptual)


def build_parts(config: Config, base: BaseModel, loss: DecoderLoss, lengths: dict[str, int]) -> VaeParts:
    """The autoencoder with its decoder ready to train, and the discriminator if there is one."""
    section = config.vae_training
    device = choose_device(config.training.device)
    vae = base.load_vae(torch.float32)
    recompute(vae, config.training.gradient_checkpointing)
    decoder = trained_parts(vae.to(device))
    adversary = None
    if section.adversarial_weight > 0:
        discriminator = build_discriminator(seed_of(config.run.seed, "vae-discriminator")).to(device)
        judge = torch.optim.AdamW(
            discriminator.parameters(), lr=section.learning_rate, betas=DISCRIMINATOR_BETAS, weight_decay=0.0, fused=True
        )
        adversary = Adversary(discriminator, judge, section.adversarial_weight, section.adversarial_start.in_steps(**lengths))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=section.learning_rate, betas=BETAS, weight_decay=0.0, fused=True)
    ema = Ema(dict(decoder.named_parameters()), decay=section.ema_decay, warmup=True, device=None)
    warmup_steps, total_steps = (duration.in_steps(**lengths) for duration in (section.warmup, section.length))

    def learning_rate(step: int) -> float:
        factor = learning_rate_factor(step, schedule="constant", warmup_steps=warmup_steps, total_steps=total_steps, end_factor=1.0)
        return section.learning_rate * factor

    autocast = section.precision == "bf16_mixed"
    return VaeParts(vae, decoder, optimizer, ema, loss, adversary, learning_rate, autocast, config.training.clip_norm, device)


def find_data(config: Config) -> VaeData:
    """The pictures of the sources that are large enough, and which of them are held out. Raises DataError if none is left."""
    section, opener = config.vae_training, opener_of(config)
    manifest = find_pictures(config, opener, read_quarantine(config.cache.folder))
    small = np.flatnonzero(manifest.sizes_hw.min(axis=1) < section.resolution)
    reason = f"has a side below vae_training.resolution = {section.resolution}"
    manifest = manifest.without({int(row): reason for row in small}, bad=False)
    rows, held_out = split(manifest, share=config.validation.share, max_pictures=config.validation.max_pictures)
    if not len(rows):
        why = f"{len(small):,} are smaller than the crops; lower vae_training.resolution" if len(small) else "add some to data.sources"
        raise DataError("there is no picture to train the decoder on", hint=why)
    reader = CropReader(
        opener, config.run.seed, section.resolution, max(section.resolution, config.buckets.resolution),
        config.data.alpha_color, config.data.max_pixels,
    )  # fmt: skip
    repeats = repeats_of(config, np.bincount(manifest.source_of[rows], minlength=len(manifest.sources)).tolist())
    rows, groups = by_source(manifest, rows, repeats)
    measured = held_out if len(held_out) else rows
    measured = measured[by_content(manifest.digests[measured])[0][: config.validation.max_pictures]]
    batches = tuple(measured[start : start + section.batch_size] for start in range(0, len(measured), section.batch_size))
    say(f"pictures    {len(rows):,} to train on, {len(held_out):,} held out, {len(small):,} too small")
    if not len(held_out):
        say("none is held out: what is measured and shown is trained on too")
    stream = CropStream(manifest, rows, Order(config.run.seed, (groups,), section.batch_size), reader)
    return VaeData(manifest, stream, batches, max(1, round(stream.order.samples_per_epoch)))


def export_trained(config: Config, base: BaseModel, parts: VaeParts, folder: Path) -> tuple[Path, ...]:
    """Writes the averaged decoder: the autoencoder alone, and in a whole model if `export.single_file` says so."""
    section, name = config.export, config.run.name
    dtype = getattr(torch, section.dtype)
    written = [folder / f"{name}-vae.safetensors"]
    export_vae(written[0], base, parts.ema.average, dtype=dtype)
    if section.single_file:
        written.append(folder / f"{name}.safetensors")
        metadata = modelspec_metadata(
            title=section.title or name, process=base.process, author=section.author, license=section.license,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        export_decoder(written[1], base, parts.ema.average, dtype=dtype, metadata=metadata)
    return tuple(written)
