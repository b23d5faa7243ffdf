"""The composition root: a config in, a run out. Below this module and `prepare`, nothing knows what a config is."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from aquatint import __version__
from aquatint.config.schema import Config, dump
from aquatint.data.batch import Batch
from aquatint.data.buckets import report_text
from aquatint.data.image import contact_sheet, save_png
from aquatint.data.ledger import write_ledger
from aquatint.data.loader import BatchReader, Draws, stream
from aquatint.data.sampler import Order
from aquatint.diffusion.schedule import sdxl_schedule
from aquatint.diffusion.timesteps import midpoint_timesteps
from aquatint.diffusion.weighting import loss_weights
from aquatint.errors import Interrupted, UsageError
from aquatint.models.sdxl.load import BaseModel, open_base
from aquatint.optim.create import create_optimizer
from aquatint.optim.lr import learning_rate_factor
from aquatint.storage import append_text, check_writable, folder_lock, shared_lock, write_json, write_text
from aquatint.tensor_file import LazyTensor
from aquatint.tracking.curves import plot_losses
from aquatint.tracking.files import MetricsFile, truncate_after
from aquatint.tracking.tracker import Several, Tracker, guarded
from aquatint.training import checkpoint
from aquatint.training.announce import announcement, captions_text
from aquatint.training.checkpoint import Trained
from aquatint.training.ema import Ema
from aquatint.training.exports import export_model
from aquatint.training.online_text import encoded
from aquatint.training.parallelize import choose_device, ready_for_training, weight_dtype
from aquatint.training.prepare import Prepared, prepare
from aquatint.training.resume import accept_config
from aquatint.training.sampling import SampleRequest, TextEmbeds, make_samples
from aquatint.training.state import Every, TrainState
from aquatint.training.step import Objective, Parts
from aquatint.training.tasks import Saver, log_action, sample_action, timings_action, validate_action
from aquatint.training.trainer import Run, Task, TrainResult, graceful_stop, train
from aquatint.training.validation import ValidationSet
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
        built.saver.save(result.state)
        if result.stopped:
            raise Interrupted(
                f"stopped at step {result.state.step} of {built.run.total_steps}; everything is saved in {folder}",
                hint="run the same command again to go on exactly there",
            )
    weights = built.trained.ema.average if built.trained.ema is not None else dict(built.trained.model.named_parameters())
    target = folder / "export" / config.run.name
    objective = built.run.parts.objective
    exported = export_model(built.base, weights, target, config.export, config.run.name, objective, config.buckets.resolution)
    plot_losses(folder / "metrics.jsonl", folder / "loss.png")
    return TrainResult(result.state, folder, stopped=False, exported=exported)


def choose_objective(config: Config, base: BaseModel) -> Objective:
    """What is learned. Raises UsageError when the config contradicts itself or the base model."""
    prediction = base.prediction if config.model.prediction == "auto" else config.model.prediction
    zero_terminal_snr = base.zero_terminal_snr if config.model.zero_terminal_snr == "auto" else config.model.zero_terminal_snr
    if zero_terminal_snr and prediction == "epsilon":
        raise UsageError(
            "model.zero_terminal_snr needs v_prediction: at its last timestep there is no picture left that epsilon could tell",
            hint="set model.prediction to v_prediction, or model.zero_terminal_snr to false",
        )
    if prediction == "epsilon" and base.prediction == "v_prediction":
        raise UsageError(
            f"{base.path.name} was trained for v_prediction, but model.prediction is epsilon",
            hint="set model.prediction to auto",
        )
    schedule = sdxl_schedule(zero_terminal_snr=zero_terminal_snr)
    weighting = config.diffusion.weighting
    if weighting == "auto":
        weighting = "clamped_v" if zero_terminal_snr else "none"
    weights = loss_weights(weighting, prediction, schedule.snr, gamma=config.diffusion.gamma, floor=config.diffusion.weight_floor)
    return Objective(schedule, prediction, weights)


@dataclass
class Built:
    """A run and what `train_run` needs around it."""

    run: Run
    saver: Saver
    trained: Trained
    base: BaseModel
    looks: tuple[Task, ...]
    samples_per_step: int

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
    checkpoint.clean(checkpoints)
    latest, notes = checkpoint.newest(checkpoints)
    for note in notes:
        say(f"warning: {note}")
    accept_config(folder, dump(config), resuming=latest is not None, accept_changes=accept_changes, say=say)
    data = prepare(config, base, say=say)
    write_ledger(data.manifest, folder)
    write_text(folder / "buckets.txt", report_text(data.layout.report))
    write_text(folder / "captions.txt", captions_text(data.layout))
    write_json(folder / "config.json", dump(config))
    write_json(folder / "environment.json", environment())
    parts, trained, total_steps = build_parts(config, base, objective, data)
    for line in announcement(config, data, parts):
        say(line)
    state = TrainState()
    if latest is not None:
        state = checkpoint.restore(latest, trained, plan_digest=data.digest, accept_changes=accept_changes)
        say(f"going on from {latest.name}, {state.samples_seen} pictures seen")
    tracker = stack.enter_context(contextlib.closing(open_trackers(config, folder, state.step)))
    display = stack.enter_context(Progress(total_steps, state.step))
    reader = build_reader(config, data)
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
    )
    saver = Saver(checkpoints, trained, data.digest, config.checkpoints.keep, display)
    looks = look_tasks(config, base, objective, data, run, tracker)
    run.tasks = build_tasks(config, data, run, tracker, looks, saver)
    if state.step == 0:
        for task in looks:
            task.run(state, None)  # type: ignore[arg-type]
    return Built(run, saver, trained, base, looks, samples_per_step(config))


def build_parts(config: Config, base: BaseModel, objective: Objective, data: Prepared) -> tuple[Parts, Trained, int]:
    """The UNet ready for training, its optimizer and average, and the number of steps of the whole run."""
    device = choose_device(config.training.device)
    unet = base.load_unet(weight_dtype(config.training.precision))
    model = ready_for_training(unet, gradient_checkpointing=config.training.gradient_checkpointing, device=device)
    settings = config.optimizer.model_dump(exclude={"name"})
    optimizer = create_optimizer(config.optimizer.name, model.named_parameters(), seed=config.run.seed, **settings)
    ema = None
    if config.ema.enabled:
        ema_device = torch.device("cpu") if config.ema.device == "cpu" else None
        ema = Ema(dict(model.named_parameters()), decay=config.ema.decay, warmup=config.ema.warmup, device=ema_device)
    lengths = {"samples_per_step": samples_per_step(config), "samples_per_epoch": data.samples_per_epoch}
    total_steps = config.training.length.in_steps(**lengths)
    warmup_steps = config.lr.warmup.in_steps(**lengths)

    def learning_rate(step: int) -> float:
        factor = learning_rate_factor(
            step, schedule=config.lr.schedule, warmup_steps=warmup_steps, total_steps=total_steps, end_factor=config.lr.end_factor
        )
        return config.optimizer.learning_rate * factor

    autocast = config.training.precision == "bf16_mixed"
    parts = Parts(model, optimizer, ema, objective, learning_rate, autocast, config.training.clip_norm, device)
    return parts, Trained(model, optimizer, ema), total_steps


def samples_per_step(config: Config) -> int:
    return config.training.batch_size * config.training.accumulation_steps


def build_reader(config: Config, data: Prepared) -> BatchReader:
    order = Order(config.run.seed, data.layout.groups, config.training.batch_size)
    draws = Draws(
        config.run.seed, samples_per_step(config), flip_prob=config.crop.flip_prob, dropout_prob=config.captions.dropout_prob,
        dropout_zeros_share=config.captions.dropout_zeros_share,
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


def look_tasks(config: Config, base: BaseModel, objective: Objective, data: Prepared, run: Run, tracker: Tracker) -> tuple[Task, ...]:
    """The tasks that look at the model: validation and sample pictures."""
    tasks = []
    if config.validation.every is not None:
        timesteps = midpoint_timesteps(config.validation.timesteps, terminal=objective.schedule.zero_terminal_snr)
        chosen = ValidationSet(data.entries, data.held_out, tuple(timesteps), config.training.batch_size)
        every = Every(config.validation.every, data.samples_per_epoch)
        tasks.append(Task(every, validate_action(run.parts, chosen, tracker, run.display)))
    if config.samples.every is not None and config.samples.prompts:
        entries = {prompt: data.stores.texts.read(key) for prompt, key in data.layout.prompts.items()}
        embeds = {prompt: (entry["prompt_embeds"], entry["pooled"]) for prompt, entry in entries.items()}
        request = replace(sample_request(config, base, run.parts.device, embeds), autocast=run.parts.autocast)
        every = Every(config.samples.every, data.samples_per_epoch)
        tasks.append(Task(every, sample_action(run.parts, request, run.folder / "samples", tracker, run.display)))
    return tuple(tasks)


def build_tasks(config: Config, data: Prepared, run: Run, tracker: Tracker, looks: tuple[Task, ...], saver: Saver) -> tuple[Task, ...]:
    """All tasks, in the order in which they are done."""
    log_every = Every(config.tracking.log_every, data.samples_per_epoch)
    return (
        Task(log_every, log_action(tracker)),
        Task(log_every, timings_action(run.folder / "timings.jsonl")),
        *looks,
        Task(Every(config.checkpoints.every, data.samples_per_epoch), saver),
    )


def sample_request(config: Config, base: BaseModel, device: torch.device, embeds: dict[str, TextEmbeds]) -> SampleRequest:
    """The prompts of the config with their embeddings, by prompt."""
    section = config.samples
    return SampleRequest(
        base=base, device=device, prompts=section.prompts, positives=tuple(embeds[prompt] for prompt in section.prompts),
        negative=None if section.negative_prompt is None else embeds[section.negative_prompt],
        height=section.height, width=section.width, num_steps=section.steps, guidance_scale=section.guidance_scale,
        guidance_rescale=section.guidance_rescale, seed=section.seed,
    )  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions that a result may depend on."""
    import diffusers
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "aquatint": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "diffusers": diffusers.__version__, "transformers": transformers.__version__, "gpu": gpu,
    }  # fmt: skip


def trained_weights(config: Config, name: str | None) -> tuple[Path, dict[str, LazyTensor]]:
    """The weights of a checkpoint (the newest if no name is given): the average if there is one. Raises UsageError."""
    checkpoints = config.run.folder / config.run.name / "checkpoints"
    path = checkpoints / name if name else checkpoint.newest(checkpoints)[0]
    if path is None or not path.is_dir():
        known = ", ".join(entry.name for entry in checkpoint.sorted_checkpoints(checkpoints)) or "none"
        raise UsageError(
            f"there is no checkpoint {name or ''} in {checkpoints}".replace("  ", " "),
            hint=f"checkpoints there: {known}; `aquatint train` makes them",
        )
    table = "ema" if (path / "ema.safetensors").exists() else "unet"
    return path, checkpoint.lazy_weights(path / f"{table}.safetensors")


def export_run(
    config: Config,
    checkpoint_name: str | None = None,
    output: Path | None = None,
    formats: tuple[Literal["single_file", "diffusers"], ...] = (),
) -> tuple[Path, ...]:
    """Exports a checkpoint of a run. `output` is a path without its ending; `formats` are the config's if none are given."""
    base = open_base(config.model.base, config.model.vae)
    path, weights = trained_weights(config, checkpoint_name)
    section = config.export
    if formats:
        section = section.model_copy(update={"single_file": "single_file" in formats, "diffusers_folder": "diffusers" in formats})
    target = output or config.run.folder / config.run.name / "export" / f"{config.run.name}-{path.name}"
    return export_model(base, weights, target, section, config.run.name, choose_objective(config, base), config.buckets.resolution)


def sample_pictures(config: Config, checkpoint_name: str | None = None) -> np.ndarray:
    """A picture per prompt of the config, uint8 (B, H, W, 3): from a checkpoint, or from the base if no run goes by its name."""
    base = open_base(config.model.base, config.model.vae)
    device = choose_device(config.training.device)
    unet = base.load_unet(torch.bfloat16 if device.type == "cuda" else torch.float32).to(device)
    if checkpoint_name is not None:
        with torch.no_grad():
            weights = trained_weights(config, checkpoint_name)[1]
            for name, parameter in unet.named_parameters():
                parameter.copy_(weights[name].load())
    section = config.samples
    texts = sorted({"", *section.prompts, *([section.negative_prompt] if section.negative_prompt is not None else [])})
    embeds = dict(zip(texts, base.caption_encoder(device).encode(texts), strict=True))
    request = sample_request(config, base, device, embeds)
    return make_samples(unet.eval(), choose_objective(config, base), request)


def sample_run(config: Config, prompts: list[str], checkpoint_name: str | None = None, output: Path | None = None) -> Path:
    """Writes a sheet of pictures of `prompts` (the config's if none are given), from the newest checkpoint or, without one, the base."""
    folder = config.run.folder / config.run.name
    chosen = tuple(prompts) or config.samples.prompts
    if not chosen:
        raise UsageError("there is no prompt", hint='give one: aquatint sample run.toml "a photo of ..."')
    if checkpoint_name is None and checkpoint.sorted_checkpoints(folder / "checkpoints"):
        checkpoint_name = trained_weights(config, None)[0].name
    say(f"sampling from {checkpoint_name or config.model.base.name}")
    pictures = sample_pictures(
        config.model_copy(update={"samples": config.samples.model_copy(update={"prompts": chosen})}), checkpoint_name
    )
    target = output or folder / "samples" / "sample.png"
    save_png(target, contact_sheet(list(pictures), list(chosen), columns=min(4, len(chosen))))
    return target
