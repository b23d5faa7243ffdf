"""Prompts to pictures, with our own samplers: what a training run shows is what the trained weights do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from aquatint.diffusion.grids import Grid, sampling_timesteps
from aquatint.diffusion.guidance import guide
from aquatint.diffusion.noise import draw_noise
from aquatint.diffusion.parameterization import Prediction, input_scale, to_epsilon, to_x0
from aquatint.diffusion.samplers import Sampler, sample
from aquatint.diffusion.schedule import Schedule
from aquatint.models.sdxl.conditioning import time_ids_tensor
from aquatint.models.sdxl.model import decode_latents, predict
from aquatint.models.sdxl.process import SDXL_SCALING, LatentScaling

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Prompt = tuple[Tensor, Tensor]
"""prompt_embeds (B, 77 n, 2048) and pooled_prompt_embeds (B, 1280)."""
PX_PER_LATENT = 8


@dataclass(frozen=True)
class Steps:
    """How pictures are drawn: the sampler, where its steps lie, and how closely they follow the prompt."""

    num_steps: int
    guidance_scale: float
    guidance_rescale: float = 0.0
    sampler: Sampler = "euler"
    grid: Grid = "trailing"


@torch.no_grad()
def generate(
    unet: torch.nn.Module,
    vae: AutoencoderKL,
    schedule: Schedule,
    prediction: Prediction,
    positive: Prompt,
    negative: Prompt | None = None,
    *,
    steps: Steps,
    seed: int,
    positions: Sequence[int],
    height: int,
    width: int,
    sigma_data: float = 1.0,
    scaling: LatentScaling = SDXL_SCALING,
    autocast: bool = False,
) -> np.ndarray:
    """Pictures (B, H, W, 3) uint8.

    Without `negative` the unconditional input is zeros. With `autocast` the UNet works in bf16, and the decoder as it is.
    The noise of a picture depends on `seed` and its position alone.
    Weights, training mode and random state of the modules stay as they are. Raises ValueError for a grid that does not suit the schedule.
    """
    device = next(unet.parameters()).device
    shape_chw = (4, height // PX_PER_LATENT, width // PX_PER_LATENT)
    noise = draw_noise(seed, "sample-image", positions, shape_chw).to(device)
    time_ids = time_ids_tensor([(height, width, 0, 0, height, width)] * len(positions)).to(device)
    embeds, pooled = (tensor.to(device) for tensor in positive)
    other_embeds, other_pooled = (tensor.to(device) for tensor in negative or (torch.zeros_like(embeds), torch.zeros_like(pooled)))

    def denoise(noisy: Tensor, timestep: float) -> tuple[Tensor, Tensor]:
        timesteps = torch.full((len(positions),), timestep, device=device, dtype=torch.float64)
        alpha, sigma = schedule.at(timesteps)
        told = schedule.unet_timesteps(timesteps).float()
        seen = noisy * input_scale(prediction, alpha, sigma, sigma_data=sigma_data)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            output = predict(unet, seen, told, embeds, pooled, time_ids)
            if steps.guidance_scale != 1:  # a pass of its own: the two texts need not have the same number of chunks
                other = predict(unet, seen, told, other_embeds, other_pooled, time_ids)
                output = guide(output, other, steps.guidance_scale, steps.guidance_rescale)
        known = {"alpha": alpha, "sigma": sigma, "sigma_data": sigma_data}
        return to_x0(prediction, output, noisy, **known), to_epsilon(prediction, output, noisy, **known)

    def fresh(step: int) -> Tensor:
        return draw_noise(seed, f"sample-step-{step}", positions, shape_chw).to(device)

    latents = sample(steps.sampler, denoise, noise, schedule, sampling_timesteps(steps.grid, schedule, steps.num_steps), fresh)
    return to_uint8(decode_latents(vae, latents.float(), scaling))


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    scaled = images.float().mul(127.5).add(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
