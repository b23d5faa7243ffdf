"""LoRA and DoRA: small trained matrices beside the frozen layers of a UNet.

An adapter is a child module `lora` of its layer, and a hook adds its output to the layer's. So the frozen weights keep their names, what
is trained has stable names of its own (`<layer>.lora.down`), and autocast and gradient checkpointing go on as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aquatint.models.adapter_shapes import NAME, AdapterSpec, added_shapes, spec_layers
from aquatint.models.frozen import FrozenLinear, weight_shapes
from aquatint.tensor_file import LazyTensor
from aquatint.utils.seeds import generator

Tensors = Mapping[str, Tensor | LazyTensor]


class LowRank(nn.Module):
    """What is trained of one layer. `down`: (r, inputs) or (r, inputs, kh, kw); `up`: (outputs, r) or (outputs, r, 1, 1)."""

    down: nn.Parameter
    up: nn.Parameter
    magnitude: nn.Parameter | None

    def __init__(self, layer: nn.Module, spec: AdapterSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = spec.scale
        self.is_on = True
        self.conv = {name: getattr(layer, name) for name in ("stride", "padding")} if isinstance(layer, nn.Conv2d) else None
        self.magnitude = None
        weight: Any = layer.parts[0] if isinstance(layer, FrozenLinear) else layer.weight
        for name, shape in added_shapes(layer.shape if isinstance(layer, FrozenLinear) else tuple(weight.shape), spec).items():
            own = torch.promote_types(dtype, torch.float32) if name == "magnitude" else dtype  # bf16 magnitudes would change the layer
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=own, device=weight.device)))

    def delta(self, x: Tensor) -> Tensor:
        """`scale * up(down(x))`."""
        if self.conv is None:
            return F.linear(F.linear(x, self.down), self.up) * self.scale
        return F.conv2d(F.conv2d(x, self.down, **self.conv), self.up) * self.scale

    def adapted(self, x: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
        """The layer's output for `x` with what is added to it. Where nothing was learned yet, that is `output` itself, bit for bit."""
        if self.magnitude is None:
            return output + self.delta(x)
        with torch.autocast(x.device.type, enabled=False):
            weight: Any = layer.weight
            ratio = self.magnitude / row_norms(weight.detach(), self.down.detach(), self.up.detach(), self.scale)
            bias: Any = layer.bias
            parts = [ratio - 1, ratio, *([] if bias is None else [bias])]
            less, all_of, *shift = (value.view(-1, 1, 1) if self.conv else value for value in parts)
        turned = output if bias is None else output - shift[0].to(output.dtype)
        return output + (less.to(output.dtype) * turned + all_of.to(output.dtype) * self.delta(x))


def row_norms(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The norm of each row of `weight + scale * up @ down`, (outputs,) float32, without making that matrix.

    DoRA takes it as a constant (arXiv 2402.09353, section 4.3), so no gradient goes through it.
    """
    w, a, b = (tensor.float().flatten(1) for tensor in (weight, down, up))
    crossed, squared = ((w @ a.t()) * b).sum(dim=1), ((b @ (a @ a.t())) * b).sum(dim=1)
    return (w.square().sum(dim=1) + 2 * scale * crossed + scale**2 * squared).clamp(min=0).sqrt()


def attach(unet: nn.Module, spec: AdapterSpec, dtype: torch.dtype) -> nn.Module:
    """Freezes a UNet and puts an adapter beside each layer that `spec` names; `start`, or a file, gives them their values."""
    unet.requires_grad_(False)
    for name in spec_layers(weight_shapes(unet), spec):
        layer = unet.get_submodule(name)
        layer.add_module(NAME, LowRank(layer, spec, dtype))
        layer.register_forward_hook(_add)
    return unet


def _add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    part: Any = layer.get_submodule(NAME)
    found: Tensor = part.adapted(inputs[0], output, layer) if part.is_on else output
    return found


@torch.no_grad()
def start(unet: nn.Module, seed: int) -> None:
    """Gives every adapter its first values, with which the UNet is the frozen one: `down` uniform within 1 / sqrt(inputs), as linear
    layers begin, and `up` zero. What is drawn depends on the seed and the layer's name alone.
    """
    for name, layer in adapted_layers(unet).items():
        part: Any = layer.get_submodule(NAME)
        bound = prod(part.down.shape[1:]) ** -0.5
        drawn = generator(seed, f"adapter/{name}", 0).random(part.down.numel(), dtype="float32")
        part.down.copy_((torch.from_numpy(drawn).view(part.down.shape) * 2 - 1) * bound)
        part.up.zero_()
        if part.magnitude is not None:
            part.magnitude.copy_(row_norms(layer.weight, part.down, part.up, part.scale))  # type: ignore[arg-type]


def adapted_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """The layers that have an adapter, by their names."""
    return {name.removesuffix(f".{NAME}"): unet.get_submodule(name.removesuffix(f".{NAME}")) for name in _part_names(unet)}


def _part_names(unet: nn.Module) -> list[str]:
    return [name for name, module in unet.named_modules() if isinstance(module, LowRank)]


@contextlib.contextmanager
def without_adapters(unet: nn.Module) -> Iterator[None]:
    """The UNet is the frozen one inside the block."""
    parts = [module for module in unet.modules() if isinstance(module, LowRank)]
    for part in parts:
        part.is_on = False
    try:
        yield
    finally:
        for part in parts:
            part.is_on = True


class Frozen(nn.Module):
    """The UNet as it is without its adapters, for a look at what it would have answered: not one weight more in memory."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with without_adapters(self.unet):
            return self.unet(*args, **kwargs)


def merged(base: Tensors, adapter: Tensors, spec: AdapterSpec, strength: float = 1.0) -> dict[str, Tensor | LazyTensor]:
    """The UNet's tensors with the adapter in them: `W + strength * scale * up @ down` in float32, each when its turn comes.

    What has no adapter is passed on as it is in `base`.
    """
    shapes = {name: tuple(value.shape) for name, value in base.items()}
    weights = dict(base)
    for layer, shape in spec_layers(shapes, spec).items():
        parts = [adapter[f"{layer}.{NAME}.{part}"] for part in added_shapes(shape, spec)]
        weight = base[f"{layer}.weight"]
        weights[f"{layer}.weight"] = LazyTensor(torch.float32, shape, partial(_merge, weight, parts, spec.scale, strength))
    return weights


@torch.no_grad()
def _merge(weight: Tensor | LazyTensor, parts: list[Tensor | LazyTensor], scale: float, strength: float) -> Tensor:
    frozen, down, up, *magnitudes = (
        (part.load() if isinstance(part, LazyTensor) else part.detach()).to("cpu", torch.float32) for part in (weight, *parts)
    )
    delta = (scale * (up.flatten(1) @ down.flatten(1))).view(frozen.shape)
    if magnitudes:
        turned = frozen + delta
        ratio = magnitudes[0] / row_norms(frozen, down, up, scale)
        delta = turned * ratio.view(-1, *(1 for _ in frozen.shape[1:])) - frozen
    return frozen + strength * delta
