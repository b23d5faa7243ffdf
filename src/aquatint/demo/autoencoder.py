"""The demo's small autoencoder: how the weights in `assets/autoencoder.safetensors` were made.

    python -m aquatint.demo.autoencoder OUTPUT.safetensors

trains it again (about twenty minutes on two cores). It has the real topology, 8x smaller on each side with four channels, and its
latents are standardised by folding mean and standard deviation into its own 1x1 convolutions, so that SDXL's scaling
factor fits it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aquatint.demo.model import tiny_spec
from aquatint.demo.pictures import draw, scenes
from aquatint.models.sdxl.model import VAE_SCALING_FACTOR, build_vae
from aquatint.tensor_file import write_tensors
from aquatint.utils.seeds import generator

STAGES = ((64, 24, 1300), (128, 12, 300))  # side in pixels, pictures per step, steps: small crops first, they are cheap
PEAK_LEARNING_RATE = 2e-3
KL_WEIGHT = 1e-5  # enough to keep the latents from growing without bound, too little to blur the pictures


def training_batch(step: int, count: int, side: int) -> torch.Tensor:
    """Random scenes, (count, 3, side, side) float32 in [-1, 1]; the shapes are larger and more scattered than in the set."""
    rng = generator(0, "autoencoder-pictures", step)
    everything = scenes()
    pictures = [
        draw(
            everything[rng.integers(len(everything))],
            (side, side),
            radius=rng.uniform(0.2, 0.5),
            shift_yx=tuple(rng.uniform(-0.3, 0.3, 2)),
        )
        for _ in range(count)
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def new_autoencoder() -> Any:
    """The network with fresh weights. Its log-variance starts low: with much noise nothing would be learned at first."""
    torch.manual_seed(0)
    vae = build_vae(tiny_spec()).to_empty(device="cpu")
    for module in vae.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -5.0
        vae.quant_conv.weight[4:] *= 0.1
    return vae.to(memory_format=torch.channels_last)


def reconstruct(vae: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures after a round trip through a drawn latent, and the KL divergence per latent element."""
    moments = vae.encode(images).latent_dist
    mean, logvar = moments.mean.float(), moments.logvar.float()
    latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return vae.decode(latents).sample.float(), kl


def train_autoencoder() -> Any:
    """Trains through all stages with one falling learning rate."""
    vae = new_autoencoder()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    total = sum(steps for _, _, steps in STAGES)
    started, step = time.monotonic(), 0
    for side, count, steps in STAGES:
        for _ in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LEARNING_RATE * min(1.0, (step + 1) / 50) * max(0.01, 1 - step / total)
            images = training_batch(step, count, side).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                output, kl = reconstruct(vae, images)
            error = output - images
            loss = error.abs().mean() + error.square().mean() + KL_WEIGHT * kl
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 100 == 0:
                psnr = -10 * np.log10(error.square().mean().item() / 4)
                print(f"step {step} of {total}, {time.monotonic() - started:.0f} s, PSNR {psnr:.1f} dB", flush=True)
    return vae


@torch.no_grad()
def standardize(vae: Any) -> None:
    """Folds per-channel mean and deviation into the 1x1 convolutions: scaled latents then have mean 0 and deviation 1.

    Decoding is unchanged to rounding. With k the scaling factor and s = k * deviation: the decoder's first convolution
    becomes W diag(s), b + W mean; the encoder's last one W / s, (b - mean) / s, and its log-variance falls by 2 ln s.
    """
    latents = torch.cat([vae.encode(training_batch(10**6 + i, 16, 128)).latent_dist.mean for i in range(8)])
    mean = latents.mean(dim=(0, 2, 3))
    scale = VAE_SCALING_FACTOR * latents.std(dim=(0, 2, 3))
    first, last = vae.post_quant_conv, vae.quant_conv
    first.bias += first.weight[:, :, 0, 0] @ mean
    first.weight *= scale.view(1, 4, 1, 1)
    last.weight[:4] /= scale.view(4, 1, 1, 1)
    last.bias[:4] = (last.bias[:4] - mean) / scale
    last.bias[4:] -= 2 * scale.log()


def main(output: Path) -> None:
    vae = train_autoencoder().to(memory_format=torch.contiguous_format)
    standardize(vae)
    write_tensors(output, {name: tensor.half().contiguous() for name, tensor in vae.state_dict().items()})
    print(f"wrote {output}, {output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
