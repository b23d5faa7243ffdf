"""What a run trains: the UNet or a part of it, or an adapter beside it. Names, shapes and number formats, without weights."""

from __future__ import annotations

from math import prod

from aquatint.config.schema import Config
from aquatint.errors import UsageError
from aquatint.models.adapter_shapes import AdapterSpec, adapter_shapes
from aquatint.models.sdxl.model import ModelSpec
from aquatint.models.sdxl.shapes import Shape
from aquatint.planning.groups import frozen_names, group_findings


def adapter_spec(config: Config) -> AdapterSpec | None:
    """The adapter that the config asks for; None if it trains the UNet itself."""
    section = config.adapter
    if section.kind == "none":
        return None
    alpha = float(section.rank) if section.alpha is None else section.alpha
    return AdapterSpec(section.kind, section.rank, alpha, section.targets, section.rslora)


def trainable_shapes(config: Config, spec: ModelSpec) -> dict[str, Shape]:
    """Name -> shape of everything that is trained unless a group freezes it."""
    adapter = adapter_spec(config)
    return spec.shapes("unet") if adapter is None else adapter_shapes(spec.shapes("unet"), adapter)


def trained_shapes(config: Config, spec: ModelSpec) -> dict[str, Shape]:
    """Name -> shape of everything that is trained."""
    shapes = trainable_shapes(config, spec)
    frozen = frozen_names(config, shapes)
    return {name: shape for name, shape in shapes.items() if name not in frozen}


def check_groups(config: Config, spec: ModelSpec) -> None:
    """Raises UsageError for groups that do not suit what is trained."""
    for finding in group_findings(config, trainable_shapes(config, spec)):
        raise UsageError(f"{finding.message} (`{finding.keys[0]}`)", hint=finding.hint)


def num_trained(config: Config, spec: ModelSpec) -> int:
    """How many numbers are trained."""
    return sum(map(prod, trained_shapes(config, spec).values()))


def num_frozen(config: Config, spec: ModelSpec) -> int:
    """How many numbers of the UNet stay as they are."""
    return spec.num_parameters("unet") - (num_trained(config, spec) if config.adapter.kind == "none" else 0)


def weight_dtype(config: Config) -> str:
    """The number format of what is trained."""
    return "bfloat16" if config.training.precision == "bf16_pure" else "float32"


def unet_dtype(config: Config) -> str:
    """The number format of the UNet. One that is frozen as a whole needs no room for small steps."""
    is_half = config.adapter.kind != "none" and config.training.precision != "fp32"
    return "bfloat16" if is_half else weight_dtype(config)
