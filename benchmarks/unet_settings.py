"""What do channels_last, our forms of GroupNorm and GEGLU, and joined projections cost or save on a CPU?

    python -m benchmarks.unet_settings

times forward and backward pass of single operations in sizes of SDXL's blocks, and of the demo's tiny UNet with each setting of `[speed]`
but compiling, in float32. All of a kind take turns, in a new order each round; what counts is how many times as fast as the plain way each
is, by the processor's time, round by round. On a CPU plain torch stands in for the Triton kernels, so these are numbers of the
stand-ins and of memory order, and say nothing about a GPU: `benchmarks/gpu/operations.py` asks that.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aquatint.models.kernels.geglu import geglu_linear
from aquatint.models.kernels.group_norm import group_norm
from aquatint.models.kernels.joined import joined_linear
from aquatint.models.sdxl.model import predict
from aquatint.models.sdxl.speed import use_channels_last, use_fused_qkv, use_kernels
from benchmarks.machine import keep, load, spread, versions
from benchmarks.ours import draw_batches, tiny_unet

Act = Callable[[], object]
Ways = dict[str, tuple[Callable[..., Any], list[Tensor]]]  # name -> what is computed, of what
ROUNDS, EPS, GROUPS = 11, 1e-5, 32
LAST = torch.channels_last
WAYS: dict[str, tuple[Callable[[Any], None], ...]] = {
    "plain": (), "channels_last": (use_channels_last,), "channels_last and kernels": (use_channels_last, use_kernels),
    "fused_qkv": (use_fused_qkv,), "all three": (use_channels_last, use_kernels, use_fused_qkv),
}  # fmt: skip


def normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def passes(function: Callable[..., Any], *tensors: Tensor) -> Act:
    """Forward and backward pass."""
    for tensor in tensors:
        tensor.requires_grad_()
    grad = torch.randn_like(function(*tensors))

    def act() -> None:
        for tensor in tensors:
            tensor.grad = None
        function(*tensors).backward(grad)

    return act


def acts(ways: Ways) -> dict[str, Act]:
    return {name: passes(function, *tensors) for name, (function, tensors) in ways.items()}


def norms(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> Ways:
    """GroupNorm and SiLU."""

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))

    def own(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm(x, weight, bias, GROUPS, EPS, silu=True)

    def tensors(*, last: bool) -> list[Tensor]:
        x = normal(device, dtype, *shape)
        return [x.contiguous(memory_format=LAST) if last else x, *(normal(device, dtype, shape[1]) for _ in range(2))]

    return {
        "plain": (plain, tensors(last=False)), "channels last": (plain, tensors(last=True)), "own": (own, tensors(last=True)),
    }  # fmt: skip


def convolutions(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> Ways:
    """3x3, as many channels out as in. The weight stays as it is, as in training."""

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=1)

    x, weight = normal(device, dtype, *shape), normal(device, dtype, shape[1], shape[1], 3, 3)
    return {
        "plain": (plain, [x, weight]),
        "channels last": (plain, [x.clone(memory_format=LAST), weight.clone()]),
        "channels last, weight too": (plain, [x.clone(memory_format=LAST), weight.clone(memory_format=LAST)]),
    }


def gates(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> Ways:
    """GEGLU and the product after it; `shape` is rows and outputs, the gated part four times as wide."""
    rows, outputs = shape

    def plain(projected: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        hidden, gate = projected.chunk(2, dim=-1)
        return F.linear(hidden * F.gelu(gate), weight, bias)

    def tensors() -> list[Tensor]:
        sizes = ((rows, 8 * outputs), (outputs, 4 * outputs), (outputs,))
        return [normal(device, dtype, *size) for size in sizes]

    return {"plain": (plain, tensors()), "own": (geglu_linear, tensors())}


def projections(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> Ways:
    """Query, key and value of the same tokens."""

    def plain(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.cat([F.linear(x, weight) for weight in weights], dim=-1)

    def own(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.cat(joined_linear(x, *weights), dim=-1)

    def tensors() -> list[Tensor]:
        return [normal(device, dtype, *shape), *(normal(device, dtype, shape[-1], shape[-1]) for _ in range(3))]

    return {"plain": (plain, tensors()), "own": (own, tensors())}


def unets() -> dict[str, Act]:
    """Forward and backward pass of the tiny UNet."""
    batch = draw_batches(dict(tiny_unet().config), 1, 1, 16)[0]
    made: dict[str, Act] = {}
    for name, ways in WAYS.items():
        unet = tiny_unet()
        for use in ways:
            use(unet)
        made[name] = one_pass(unet, batch)
    return made


def one_pass(unet: Any, batch: Any) -> Act:
    def act() -> None:
        unet.zero_grad(set_to_none=True)
        inputs = (batch.noise, batch.timesteps, batch.prompt_embeds, batch.pooled_prompt_embeds, batch.time_ids)
        predict(unet, *inputs).square().mean().backward()

    return act


KINDS: dict[str, tuple[Callable[..., Ways], tuple[int, ...]]] = {
    "GroupNorm and SiLU": (norms, (1, 320, 32, 32)), "convolution": (convolutions, (1, 320, 32, 32)), "GEGLU": (gates, (256, 640)),
    "projections": (projections, (1, 256, 640)),
}  # fmt: skip


def compare(taking_turns: dict[str, Act], rounds: int) -> dict[str, Any]:
    """Milliseconds of the processor, and how many times as fast as the plain way each is. A first round does not count."""
    taken: dict[str, list[float]] = {name: [] for name in taking_turns}
    for number in range(rounds + 1):
        for name in random.sample(list(taking_turns), len(taking_turns)):
            began = time.process_time()
            taking_turns[name]()
            if number:
                taken[name].append(1000 * (time.process_time() - began))
    return {
        name: {"ms": spread(times, 2), "times_as_fast": spread([plain / own for plain, own in zip(taken["plain"], times, strict=True)], 3)}
        for name, times in taken.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args(arguments).rounds
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cpu, before, found = torch.device("cpu"), load(), dict[str, Any]()
    for what, (build, shape) in KINDS.items():
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{what}, {str(dtype).removeprefix('torch.')}"
            found[name] = {"shape": list(shape), **compare(acts(build(cpu, dtype, shape)), rounds)}
            print(name, {way: one["times_as_fast"] for way, one in found[name].items() if way != "shape"}, flush=True)
    found["tiny UNet, float32"] = compare(unets(), rounds)
    result = {
        "versions": versions(), "load": {"before": before, "after": load()}, "rounds": rounds, "threads": 1,
        "values": "lower quartile, median, upper quartile; by the processor's time", "found": found,
    }  # fmt: skip
    keep("unet_settings_cpu", result)


if __name__ == "__main__":
    main()
