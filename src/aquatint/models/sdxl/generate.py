"""Prompts to pictures, with our own sampler: what a training run shows is what the trained weights do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from aquatint.diffusion.guidance import guide
from aquatint.diffusion.noise import draw_noise
from aquatint.diffusion.parameterization import Prediction, to_epsilon, to_x0
from aquatint.diffusion.samplers import euler
from aquatint.diffusion.schedule import Schedule
from aquatint.diffusion.timesteps import trailing_timesteps
from aquatint.models.sdxl.conditioning import time_ids_tensor
from aquatint.models.sdxl.model import decode_latents, predict

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Prompt = tuple[Tensor, Tensor]
"""prompt_embeds (B, 77 n, 2048) and pooled_prompt_embeds (B, 1280)."""
PX_PER_LATENT = 8


@torch.no_grad()
def generate(
    unet: torch.nn.Module,
    vae: AutoencoderKL,
    schedule: Schedule,
    prediction: Prediction,
    positive: Prompt,
    negative: Prompt | None = None,
    *,
    seed: int,
    positions: Sequence[int],
    height: int,
    width: int,
    num_steps: int,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
    autocast: bool = False,
) -> np.ndarray:
    """Pictures (B, H, W, 3) uint8, by Euler steps along trailing timesteps.

    Without `negative` the unconditional input is zeros. With `autocast` the UNet works in bf16, and the decoder as it is.
    The noise of a picture depends on `seed` and its position alone.
    Weights, training mode and random state of the modules stay as they are.
    """
    device = next(unet.parameters()).device
    noise = draw_noise(seed, "sample-image", positions, (4, height // PX_PER_LATENT, width // PX_PER_LATENT)).to(device)
    time_ids = time_ids_tensor([(height, width, 0, 0, height, width)] * len(positions)).to(device)
    embeds, pooled = (tensor.to(device) for tensor in positive)
    other_embeds, other_pooled = (tensor.to(device) for tensor in negative or (torch.zeros_like(embeds), torch.zeros_like(pooled)))

    def denoise(noisy: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        timesteps = torch.full((len(positions),), timestep, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            output = predict(unet, noisy, timesteps, embeds, pooled, time_ids)
            if guidance_scale != 1:  # a pass of its own: the two texts need not have the same number of chunks
                other = predict(unet, noisy, timesteps, other_embeds, other_pooled, time_ids)
                output = guide(output, other, guidance_scale, guidance_rescale)
        alpha, sigma = schedule.at(timesteps)
        return to_x0(prediction, output, noisy, alpha, sigma), to_epsilon(prediction, output, noisy, alpha, sigma)

    latents = euler(denoise, noise, schedule, trailing_timesteps(num_steps))
    return to_uint8(decode_latents(vae, latents))


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    scaled = images.float().mul(127.5).add(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
