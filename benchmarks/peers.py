"""The step of others, written anew after what their scripts do: nothing here is copied, and nothing is left out.

`script_loop` does in each step what the loop of diffusers' text-to-image script for SDXL does: time ids made from Python numbers,
DDPMScheduler's noise, a mean squared error, two readings of the loss, a clip, AdamW, a learning-rate scheduler. With
`script_loop_accelerate` the same goes through accelerate's Accelerator, as in the script. `strong_loop` is what a careful user makes of
the same parts: no reading of the loss, everything on the device.
All of them are given noise and timesteps, as ours is: drawing them is no part of any comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from torch import Tensor

from aquatint.data.batch import Batch
from benchmarks.ours import PX_PER_LATENT, Loop

SDXL_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
MAX_GRAD_NORM = 1.0


@dataclass
class Script:
    """What the script has at hand when its loop begins."""

    unet: Any
    optimizer: Any
    noise_scheduler: DDPMScheduler
    lr_scheduler: Any
    device: torch.device
    weight_dtype: torch.dtype
    clip_norm: float = MAX_GRAD_NORM


def script(
    unet: Any, optimizer: Any, *, prediction: str = "epsilon", device: torch.device | str = "cpu",
    weight_dtype: torch.dtype = torch.float32,
) -> Script:  # fmt: skip
    """`weight_dtype` is what frozen weights and inputs have: bfloat16 with mixed precision."""
    noise_scheduler = DDPMScheduler(**SDXL_NOISE, prediction_type=prediction)
    lr_scheduler = get_scheduler("constant", optimizer=optimizer)
    return Script(unet, optimizer, noise_scheduler, lr_scheduler, torch.device(device), weight_dtype)


def time_ids_of(made: Script, batch: Batch) -> Tensor:
    """A small tensor for each picture, from numbers that the data set keeps as numbers, and then one of all. Pictures are not cropped."""
    height_px, width_px = (PX_PER_LATENT * side for side in batch.latents.shape[2:])
    rows = [(height_px, width_px, 0, 0, height_px, width_px)] * len(batch.names)
    return torch.cat([torch.tensor([row], device=made.device, dtype=made.weight_dtype) for row in rows])


def forward(made: Script, batch: Batch, time_ids: Tensor) -> Tensor:
    """The loss of a batch that is on the device."""
    noisy = made.noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps).to(dtype=made.weight_dtype)
    conditions = {"time_ids": time_ids, "text_embeds": batch.pooled_prompt_embeds}
    prompt_embeds = batch.prompt_embeds.to(dtype=made.weight_dtype)  # type: ignore[union-attr]
    output = made.unet(noisy, batch.timesteps, prompt_embeds, added_cond_kwargs=conditions, return_dict=False)[0]
    return F.mse_loss(output.float(), target_of(made, batch).float(), reduction="mean")


def target_of(made: Script, batch: Batch) -> Tensor:
    if made.noise_scheduler.config.prediction_type == "epsilon":
        return batch.noise
    return made.noise_scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)


def trained(made: Script) -> list[Tensor]:
    return [parameter for parameter in made.unet.parameters() if parameter.requires_grad]


def script_loop(made: Script) -> Loop:
    """The script without accelerate: what that does on one device, in plain torch."""
    autocast = made.weight_dtype == torch.bfloat16

    def step(batch: Batch) -> float:
        batch = batch.to(made.device)
        with torch.autocast(made.device.type, torch.bfloat16, enabled=autocast):
            loss = forward(made, batch, time_ids_of(made, batch))
        train_loss = loss.detach().repeat(len(batch.names)).mean().item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained(made), made.clip_norm)
        made.optimizer.step()
        made.lr_scheduler.step()
        made.optimizer.zero_grad()
        logs = {"step_loss": loss.detach().item(), "lr": made.lr_scheduler.get_last_lr()[0]}
        assert logs["step_loss"] == logs["step_loss"]
        return train_loss

    return lambda batches, steps: [step(next(batches)) for _ in range(steps)]


def script_loop_accelerate(made: Script) -> Loop:
    """The script with accelerate's Accelerator around model, optimizer, backward pass, clip and log."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16" if made.weight_dtype == torch.bfloat16 else "no", cpu=made.device.type == "cpu")
    unet, optimizer, lr_scheduler = accelerator.prepare(made.unet, made.optimizer, made.lr_scheduler)
    prepared = Script(unet, optimizer, made.noise_scheduler, lr_scheduler, made.device, made.weight_dtype)

    def step(batch: Batch) -> float:
        with accelerator.accumulate(unet):
            batch = batch.to(accelerator.device)
            loss = forward(prepared, batch, time_ids_of(prepared, batch))
            train_loss: float = accelerator.gather(loss.repeat(len(batch.names))).mean().item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained(prepared), made.clip_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            accelerator.log({"train_loss": train_loss})
        logs = {"step_loss": loss.detach().item(), "lr": lr_scheduler.get_last_lr()[0]}
        assert logs["step_loss"] == logs["step_loss"]
        return train_loss

    return lambda batches, steps: [step(next(batches)) for _ in range(steps)]


def strong_loop(made: Script, *, channels_last: bool = True) -> Loop:
    """The same parts without a look at the loss, for a UNet and an optimizer that were chosen with care."""
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def step(batch: Batch) -> Tensor:
        batch = batch.to(made.device)
        batch.latents, batch.noise = (tensor.to(memory_format=layout) for tensor in (batch.latents, batch.noise))
        batch.pooled_prompt_embeds = batch.pooled_prompt_embeds.to(made.weight_dtype)
        loss = forward(made, batch, batch.time_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained(made), made.clip_norm)
        made.optimizer.step()
        made.optimizer.zero_grad(set_to_none=True)
        return loss.detach().clone()

    def loop(batches: Iterator[Batch], steps: int) -> list[Tensor]:
        losses = []
        for _ in range(steps):
            if made.device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()  # what mode reduce-overhead must be told
            losses.append(step(next(batches)))
        return losses

    return loop
