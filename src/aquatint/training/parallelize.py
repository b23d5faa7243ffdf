"""What happens to the model before it is trained, in a fixed order: freeze, adapt, memory format, kernels, checkpoint, compile, place."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from aquatint.errors import UsageError
from aquatint.models.recompute import Recompute, recompute
from aquatint.optim.adamw_bf16 import has_kernels

LARGE_MODEL_BYTES = 1 << 28
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def return_freed_memory() -> None:
    """Tells glibc to give tensors above 1 MiB back to the system when they are freed.

    Otherwise their memory stays with the process and falls to pieces: a full-size model then takes 14.5 GiB to train on a CPU, and
    10.6 so. Other C libraries ignore it.
    """
    tell_glibc(M_MMAP_THRESHOLD, 1 << 20)


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed, up to 1 GiB, but for tensors above 32 MiB.

    By itself it gives back the memory of a small model at every step, and fresh pages cost a twentieth of the next step.
    """
    tell_glibc(M_TRIM_THRESHOLD, 1 << 30)
    tell_glibc(M_MMAP_THRESHOLD, 1 << 25)  # the most it takes


def tell_glibc(option: int, value: int) -> None:
    """Sets an option of malloc; other C libraries have none."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)


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


@dataclass(frozen=True)
class Speed:
    """How the UNet is computed. `num_shapes`: of pictures in the run, which is how often a block may be compiled."""

    channels_last: bool = False
    kernels: bool = False
    fused_qkv: bool = False
    compile: Literal["none", "blocks"] = "none"
    num_shapes: int = 1


def ready_for_training(
    unet: Any,
    *,
    gradient_checkpointing: Recompute,
    device: torch.device,
    adapt: Callable[[Any], None] | None = None,
    frozen: Collection[str] = (),
    speed: Speed = Speed(),
) -> torch.nn.Module:
    """The UNet on its device, recomputing activations if asked. Raises UsageError for a `speed` that the device does not have.

    All weights but the `frozen` ones are trained, or those that `adapt` adds while it freezes the UNet.
    """
    if adapt is None:
        unet.requires_grad_(True)
    else:
        adapt(unet)
    for name in frozen:
        unet.get_parameter(name).requires_grad_(False)
    rearrange(unet, speed, device, lean=not gradient_checkpointing)
    recompute(unet, gradient_checkpointing)
    compile_as_asked(unet, speed)
    unet.train()
    if device.type == "cpu":
        is_large = sum(p.numel() * p.element_size() for p in unet.parameters()) > LARGE_MODEL_BYTES
        return_freed_memory() if is_large else keep_freed_memory()
    return unet.to(device)  # type: ignore[no-any-return]


def rearrange(unet: Any, speed: Speed, device: torch.device, *, lean: bool) -> None:
    """Another order in memory, and other operations for the same arithmetic, where asked; what does nothing is left out unasked.

    `lean`: what kernels keep for the backward pass is as little as can be, which checkpointing has no use for. Raises UsageError
    without Triton for a GPU.
    """
    needs_triton = [name for name, asked in (("kernels", speed.kernels), ("compile", speed.compile != "none")) if asked]
    if needs_triton and device.type == "cuda" and not has_kernels(device):
        raise UsageError(
            f"speed.{needs_triton[0]} is set, which needs Triton and a GPU of compute capability 8.0 or newer",
            hint=f"install triton (RTX 30xx, A100 and newer can use it), or leave out speed.{needs_triton[0]}",
        )
    from aquatint.models.sdxl import speed as ways

    ways.leave_out_idle(unet)
    for asked, use in (
        (speed.channels_last, ways.use_channels_last),
        (speed.kernels, partial(ways.use_kernels, lean=lean)),
        (speed.fused_qkv, ways.use_fused_qkv),
    ):
        if asked:
            use(unet)


def compile_as_asked(unet: Any, speed: Speed) -> None:
    """After checkpointing, so that what is computed again is computed by compiled blocks. Raises UsageError for a torch that is too old."""
    if speed.compile == "blocks":
        from aquatint.models.sdxl import speed as ways

        if not ways.can_compile_exactly():
            raise UsageError(
                f"speed.compile is set, but torch {torch.__version__} may compile the same blocks to other arithmetic the next time",
                hint="install a newer torch, or leave out speed.compile: a resumed run could not go on exactly",
            )
        ways.compile_blocks(unet, speed.num_shapes)
