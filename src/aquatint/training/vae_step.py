"""One step of training the autoencoder's decoder: encode as before, decode, compare, go down the gradient.

Encoder and `quant_conv` stay as they are, so latents mean what they meant, and no UNet notices. The loss is that of VQGAN
(arXiv 2012.09841, section 3.1) without its codebook: differences of pixels and of features, and a discriminator's verdict.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aquatint.models.patchgan import adaptive_weight, discriminator_loss, generator_loss
from aquatint.models.perceptual import PerceptualWeights, perceptual_distance
from aquatint.models.sdxl.model import LOGVAR_RANGE
from aquatint.training.checkpoint import Trained, fill, optimizer_tensors, restore_optimizer
from aquatint.training.ema import Ema
from aquatint.training.step import StepReport, gradient_norm
from aquatint.training.vae_pictures import PictureBatch

TRAINED = ("decoder", "post_quant_conv")  # the parts of the autoencoder that are


@dataclass(frozen=True)
class DecoderLoss:
    """What a decoded picture is compared by, and how much each counts."""

    l1_weight: float
    mse_weight: float
    perceptual_weight: float = 0.0
    perceptual: PerceptualWeights | None = None

    def parts(self, output: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Mean differences of pictures (B, 3, H, W) in [-1, 1], unweighted."""
        error = output - images
        parts = {"l1": error.abs().mean(), "mse": error.square().mean()}
        if self.perceptual is not None:
            parts["perceptual"] = perceptual_distance(self.perceptual, output, images).mean()
        return parts

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of `parts`."""
        weights = {"l1": self.l1_weight, "mse": self.mse_weight, "perceptual": self.perceptual_weight}
        return torch.stack([weights[name] * part for name, part in parts.items()]).sum()


@dataclass(frozen=True)
class Adversary:
    """The discriminator, how much its verdict counts, and the optimizer step that it joins in at."""

    discriminator: torch.nn.Module
    optimizer: torch.optim.Optimizer
    weight: float
    start_step: int


@dataclass
class VaeParts:
    """Everything that has weights or moves them. `decoder` holds the trained parts of `vae`, under the autoencoder's own names."""

    vae: Any
    decoder: torch.nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema
    loss: DecoderLoss
    adversary: Adversary | None
    learning_rate: Callable[[int], float]  # optimizer step, from 0 -> learning rate
    autocast: bool
    clip_norm: float
    device: torch.device

    def tables(self) -> dict[str, Mapping[str, Tensor]]:
        """What a checkpoint holds."""
        tables: dict[str, Mapping[str, Tensor]] = {
            "decoder": dict(self.decoder.named_parameters()), "optimizer": optimizer_tensors(self._own), "ema": self.ema.average,
        }  # fmt: skip
        if self.adversary is not None:
            tables["discriminator"] = dict(self.adversary.discriminator.named_parameters())
            tables["discriminator-optimizer"] = optimizer_tensors(self._others)
        return tables

    def fill_from(self, path: Path) -> None:
        """Takes everything from a checkpoint. Raises ResumeError if it is of another autoencoder or another loss."""
        fill(path / "decoder.safetensors", dict(self.decoder.named_parameters()))
        fill(path / "ema.safetensors", self.ema.average)
        restore_optimizer(path / "optimizer.safetensors", self._own)
        if self.adversary is not None:
            fill(path / "discriminator.safetensors", dict(self.adversary.discriminator.named_parameters()))
            restore_optimizer(path / "discriminator-optimizer.safetensors", self._others)

    @property
    def _own(self) -> Trained:
        return Trained(self.decoder, self.optimizer, None)

    @property
    def _others(self) -> Trained:
        assert self.adversary is not None
        return Trained(self.adversary.discriminator, self.adversary.optimizer, None)


@dataclass(frozen=True)
class VaeReport(StepReport):
    """`loss` leaves the discriminator out, so that it can be compared from step to step; `figures` has each part."""

    figures: Mapping[str, float] = field(default_factory=dict)


def trained_parts(vae: Any) -> torch.nn.ModuleDict:
    """The parts that are trained, under the autoencoder's own names, ready for it; all else is frozen."""
    vae.requires_grad_(False)
    decoder = torch.nn.ModuleDict({name: getattr(vae, name) for name in TRAINED})
    return decoder.requires_grad_(True)


def reconstruct(parts: VaeParts, batch: PictureBatch) -> Tensor:
    """Pictures after a round trip through one sample of their latents' distribution: (B, 3, H, W) float32, about [-1, 1]."""
    with half_precision(parts):
        with torch.no_grad():
            mean, log_variance = parts.vae.encode(batch.images).latent_dist.parameters.float().chunk(2, dim=1)
            latents = mean + torch.exp(0.5 * log_variance.clamp(*LOGVAR_RANGE)) * batch.noise
        output: Tensor = parts.vae.decode(latents).sample
    return output.float()


def half_precision(parts: VaeParts) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast if the run asks for it."""
    return torch.autocast(parts.device.type, torch.bfloat16, enabled=parts.autocast)


def vae_step(parts: VaeParts, batches: Sequence[PictureBatch], step: int) -> VaeReport:
    """One step of the decoder, and of the discriminator once it has joined in. If anything is not finite, nothing is changed.

    Both go from the same decoded pictures, so the discriminator judges what the decoder was before this step.
    """
    (batch,) = (one.to(parts.device) for one in batches)
    adversary = parts.adversary if parts.adversary is not None and step >= parts.adversary.start_step else None
    loss, pull, losses, more = passes(parts, batch, adversary)
    own = list(parts.decoder.parameters())
    moved = [(parts.optimizer, own)]
    if adversary is not None:
        moved.append((adversary.optimizer, list(adversary.discriminator.parameters())))
    norms = [gradient_norm(parameters) for _, parameters in moved]
    finite = bool(torch.isfinite(torch.stack([loss + pull, *more.values(), *norms]).detach()).all())
    learning_rate = parts.learning_rate(step)
    if finite:
        if parts.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(own, parts.clip_norm, norms[0])
        for optimizer, _ in moved:
            _advance(optimizer, learning_rate)
        parts.ema.update(step)
    for optimizer, _ in moved:
        optimizer.zero_grad(set_to_none=True)
    figures = {name: value.item() for name, value in {**losses, **more}.items()}
    return VaeReport(
        loss=loss.item(), gradient_norm=norms[0].item(), learning_rate=learning_rate, finite=finite,
        samples=len(batch.names), names=batch.names, figures=figures,
    )  # fmt: skip


def passes(
    parts: VaeParts, batch: PictureBatch, adversary: Adversary | None
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Forward and backward: the loss, what the discriminator adds to it, the parts of the one, and those of the other."""
    output = reconstruct(parts, batch)
    losses = parts.loss.parts(output, batch.images)
    loss = parts.loss.total(losses)
    pull, more = _adversarial(parts, adversary, output, loss) if adversary else (torch.zeros_like(loss), {})
    (loss + pull).backward(inputs=list(parts.decoder.parameters()))
    if adversary is not None:
        more["discriminator_loss"] = _judge(adversary, batch.images, output.detach())
    return loss, pull, losses, more


def _adversarial(parts: VaeParts, adversary: Adversary, output: Tensor, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What the discriminator adds to the decoder's loss, weighed against it; and its parts."""
    verdict = generator_loss(adversary.discriminator(output))
    balance = adaptive_weight(loss, verdict, parts.vae.decoder.conv_out.weight)
    return adversary.weight * balance * verdict, {"adversarial": verdict.detach(), "adaptive_weight": balance}


def _judge(adversary: Adversary, images: Tensor, output: Tensor) -> Tensor:
    """The discriminator's own loss, whose gradient is left on its weights."""
    loss = discriminator_loss(adversary.discriminator(images), adversary.discriminator(output))
    loss.backward()
    return loss.detach()


def _advance(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
