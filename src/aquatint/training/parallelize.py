"""What happens to the model before it is trained, in a fixed order: cast, checkpoint, place."""

from __future__ import annotations

from typing import Any, Literal

import torch

from aquatint.errors import UsageError


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Raises UsageError if a GPU is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "training.device is cuda, but torch finds no CUDA GPU",
            hint="run `aquatint doctor` to see what torch finds, or set training.device to auto",
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def weight_dtype(precision: Literal["bf16_mixed", "bf16_pure", "fp32"]) -> torch.dtype:
    """The number format of the trained weights."""
    return torch.bfloat16 if precision == "bf16_pure" else torch.float32


def ready_for_training(unet: Any, *, gradient_checkpointing: bool, device: torch.device) -> torch.nn.Module:
    """The UNet with all weights trainable, on its device, recomputing activations if asked."""
    unet.requires_grad_(True)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    return unet.to(device)  # type: ignore[no-any-return]
