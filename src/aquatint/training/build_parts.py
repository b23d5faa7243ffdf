"""From a config to what is trained: the UNet ready for it, its optimizer, its average, and what a step needs beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from aquatint.config.schema import Config
from aquatint.models.adapters import Frozen
from aquatint.models.frozen import halve
from aquatint.models.sdxl.conditioning import TextEncoders
from aquatint.models.sdxl.load import BaseModel
from aquatint.optim.clipping import Clipping
from aquatint.optim.create import AnyOptimizer, Own, create_optimizer
from aquatint.optim.fused import FusedBackward
from aquatint.optim.library_optimizer import LibraryOptimizer
from aquatint.optim.lr import learning_rate_factor
from aquatint.optim.offload import MainMemory
from aquatint.planning.groups import own_settings
from aquatint.planning.kept import half_frozen
from aquatint.planning.trained import trainable_shapes, trained_encoders, unet_dtype
from aquatint.training.adapting import adapting, compacting
from aquatint.training.checkpoint import Trained
from aquatint.training.ema import Ema, decay_of_half_life
from aquatint.training.free_average import FreeAverage
from aquatint.training.layout import Layout
from aquatint.training.objective import Objective
from aquatint.training.objectives import choose_adaptation, choose_densities, mean_density
from aquatint.training.parallelize import Speed, choose_device, ready_for_training, trained_parameters
from aquatint.training.prepare import Prepared
from aquatint.training.step import Parts
from aquatint.training.text_training import TextTraining, join_encoders


def build_parts(
    config: Config, base: BaseModel, objective: Objective, data: Prepared, *, resuming: bool = False
) -> tuple[Parts, Trained, int]:
    """The UNet ready for training, its optimizer and average, and the number of steps of the whole run."""
    device = choose_device(config.training.device)
    own = own_settings(config, trainable_shapes(config, base.spec))
    model, encoders = build_model(config, base, own, len(data.layout.plan.shapes), device, resuming=resuming)
    optimizer = build_optimizer(config, model, own, device)
    clipping = Clipping(config.training.clip, config.training.clip_norm, device=device)
    fused = FusedBackward(optimizer, clipping) if config.training.fused_backward else None
    is_free = config.optimizer.name == "schedule_free"  # which keeps an average anyway
    ema = FreeAverage(optimizer) if is_free else build_ema(config, model, data.samples_per_epoch)
    has_prior = objective.mask_prior_weight > 0 and data.train.has_masks
    frozen = build_prior(config, base, model, device) if has_prior else None
    drawn = mean_density(choose_densities(config, base, data.layout.plan.shapes), bucket_samples(data.layout))
    adaptation = choose_adaptation(config, objective, drawn, device)
    lengths = {"samples_per_step": config.training.per_step, "samples_per_epoch": data.samples_per_epoch}
    total_steps = config.training.length.in_steps(**lengths)
    learning_rate = build_learning_rate(config, lengths)
    autocast, texts = config.training.precision == "bf16_mixed", build_texts(config, encoders, lengths)
    parts = Parts(model, optimizer, ema, objective, learning_rate, autocast, clipping, device, adaptation, frozen, fused, texts)
    return parts, Trained(model, optimizer, ema, adaptation, clipping), total_steps


def build_model(
    config: Config, base: BaseModel, own: Own, num_shapes: int, device: torch.device, *, resuming: bool
) -> tuple[torch.nn.Module, TextEncoders | None]:
    """The UNet ready for training, with the text encoders in it if one of them is trained."""
    unet = base.load_unet(getattr(torch, unet_dtype(config)), compacting(config, base))
    halve(unet, half_frozen(config, base.spec))
    encoders = build_encoders(config, base, unet, device)
    adapt = adapting(config, base, resuming=resuming)
    frozen = [name for name, group in own.items() if group.is_frozen and adapt is None]  # an adapter goes to no frozen layer
    speed = Speed(**config.speed.model_dump(), num_shapes=num_shapes)
    checkpointing = config.training.gradient_checkpointing
    return ready_for_training(unet, gradient_checkpointing=checkpointing, device=device, adapt=adapt, frozen=frozen, speed=speed), encoders


def build_optimizer(config: Config, model: torch.nn.Module, own: Own, device: torch.device) -> AnyOptimizer:
    """The optimizer over what is trained of a model, with its state where the config wants it."""
    settings = config.optimizer.model_dump(exclude={"name"})
    optimizer = create_optimizer(config.optimizer.name, trained_parameters(model).items(), seed=config.run.seed, own=own, **settings)
    if config.memory.optimizer_state == "cpu" and not isinstance(optimizer, LibraryOptimizer):
        optimizer.keeper = MainMemory(device)
    return optimizer


def build_prior(config: Config, base: BaseModel, model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The UNet as it was: a model without its adapter, or the base's once more."""
    if config.adapter.kind != "none":
        return Frozen(model)
    half = torch.bfloat16 if config.training.precision != "fp32" else torch.float32
    prior: torch.nn.Module = base.load_unet(half).requires_grad_(False).to(device)
    return prior


def build_learning_rate(config: Config, lengths: Mapping[str, int]) -> Callable[[int], float]:
    """Optimizer step, from 0 -> learning rate."""
    factor = partial(
        learning_rate_factor, schedule=config.lr.schedule, warmup_steps=config.lr.warmup.in_steps(**lengths),
        total_steps=config.training.length.in_steps(**lengths), end_factor=config.lr.end_factor,
        reference_steps=config.lr.reference.in_steps(**lengths),
    )  # fmt: skip
    return lambda step: config.optimizer.learning_rate * factor(step)


def build_encoders(config: Config, base: BaseModel, unet: torch.nn.Module, device: torch.device) -> TextEncoders | None:
    """The text encoders, if one of them is trained; it is a child of the UNet from then on."""
    if not (trained := trained_encoders(config)):
        return None
    return join_encoders(unet, base, trained, dtype=getattr(torch, unet_dtype(config)), device=device)


def build_texts(config: Config, encoders: TextEncoders | None, lengths: Mapping[str, int]) -> TextTraining | None:
    """What encodes captions in each step, if a text encoder is trained."""
    if encoders is None:
        return None
    stop = config.text_encoders.stop_after
    return TextTraining(encoders, config.training.precision == "bf16_mixed", None if stop is None else stop.in_steps(**lengths))


def build_ema(config: Config, model: torch.nn.Module, samples_per_epoch: int) -> Ema | None:
    """The averages of the weights, if the config asks for them."""
    section, decay, per_step = config.ema, config.ema.decay, config.training.per_step
    if not section.enabled:
        return None
    if section.half_life is not None:
        half_life = section.half_life.in_samples(samples_per_step=per_step, samples_per_epoch=samples_per_epoch)
        decay = decay_of_half_life(half_life, per_step)
    device = torch.device("cpu") if section.device == "cpu" else None
    settings: dict[str, Any] = {"warmup": section.warmup, "device": device, "power_stds": section.power_stds}
    return Ema(trained_parameters(model), decay=decay, samples_per_step=per_step, **settings)


def bucket_samples(layout: Layout) -> list[float]:
    """How many samples of an epoch come from each bucket."""
    return [sum(group.count * float(group.repeats) for group in groups) for groups in layout.groups]
