"""What happens to the model before it is trained, in a fixed order: freeze and adapt, checkpoint, place."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection
from typing import Any, Literal

import torch

from aquatint.errors import UsageError

LARGE_MODEL_BYTES = 1 << 30
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def return_freed_memory() -> None:
    """Tells glibc to give tensors above 1 MiB back to the system when they are freed.

    Otherwise their memory stays with the process and falls to pieces: a full-size model then takes 14.5 GiB to train on a CPU, and
    10.6 so. Small models are better off without, since fresh pages cost time. Other C libraries ignore it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


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


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What is trained of a model, by name: all of it but for what groups freeze, or the adapters of a frozen one."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def ready_for_training(
    unet: Any,
    *,
    gradient_checkpointing: bool,
    device: torch.device,
    adapt: Callable[[Any], None] | None = None,
    frozen: Collection[str] = (),
) -> torch.nn.Module:
    """The UNet on its device, recomputing activations if asked.

    All weights but the `frozen` ones are trained, or those that `adapt` adds while it freezes the UNet.
    """
    if adapt is None:
        unet.requires_grad_(True)
    else:
        adapt(unet)
    for name in frozen:
        unet.get_parameter(name).requires_grad_(False)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    if device.type == "cpu" and sum(p.numel() * p.element_size() for p in unet.parameters()) > LARGE_MODEL_BYTES:
        return_freed_memory()
    return unet.to(device)  # type: ignore[no-any-return]
