"""What a run trains: the UNet or a part of it, or an adapter beside it, and text encoders likewise.

Names, shapes and number formats, without weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from aquatint.config.group_rules import has_frozen_group
from aquatint.config.schema import Config
from aquatint.config.text_rules import trains_text
from aquatint.errors import UsageError
from aquatint.models.adapter_shapes import AdapterSpec, adapter_shapes
from aquatint.models.sdxl.model import ModelSpec
from aquatint.models.sdxl.shapes import TEXT_ENCODERS, Shape, TextEncoder, by_component, qualified
from aquatint.planning.groups import frozen_names, group_findings


def adapter_spec(config: Config) -> AdapterSpec | None:
    """The adapter that the config asks for; None if it trains the UNet itself."""
    section = config.adapter
    if section.kind == "none":
        return None
    alpha = float(section.rank) if section.alpha is None else section.alpha
    groups = tuple((pattern, group.learning_rate_factor == 0) for group in config.training.groups for pattern in group.match)
    return AdapterSpec(section.kind, section.rank, alpha, section.targets, section.rslora, groups if has_frozen_group(config) else ())


def trained_encoders(config: Config) -> tuple[TextEncoder, ...]:
    """The text encoders that are trained, in their own order."""
    return tuple(one for one in TEXT_ENCODERS if one in config.text_encoders.train)


def weight_shapes(config: Config, spec: ModelSpec) -> dict[str, Shape]:
    """Name -> shape of the weights that are trained, or that adapters can be beside."""
    texts = {qualified(one, name): shape for one in trained_encoders(config) for name, shape in spec.heard_shapes(one).items()}
    return spec.shapes("unet") | texts


def trainable_shapes(config: Config, spec: ModelSpec) -> dict[str, Shape]:
    """Name -> shape of everything that is trained unless a group freezes it."""
    adapter, shapes = adapter_spec(config), weight_shapes(config, spec)
    return shapes if adapter is None else adapter_shapes(shapes, replace(adapter, groups=()))


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
    return spec.num_parameters("unet") - _num_own(config, by_component(trained_shapes(config, spec))["unet"])


def num_frozen_text(config: Config, spec: ModelSpec) -> int:
    """How many numbers of the text encoders stay as they are, in a run that has them in memory because one is trained."""
    if not trains_text(config):
        return 0
    trained = by_component(trained_shapes(config, spec))
    held = sum(prod(shape) for one in TEXT_ENCODERS for shape in spec.heard_shapes(one).values())
    return held - sum(_num_own(config, trained.get(one, {})) for one in TEXT_ENCODERS)


def _num_own(config: Config, trained: Mapping[str, Shape]) -> int:
    """How many of these numbers are weights of a network, and not beside them."""
    return sum(map(prod, trained.values())) if config.adapter.kind == "none" else 0


def weight_dtype(config: Config) -> str:
    """The number format of what is trained."""
    return "bfloat16" if config.training.precision == "bf16_pure" else "float32"


def unet_dtype(config: Config) -> str:
    """The number format of the UNet. One that is frozen as a whole needs no room for small steps."""
    is_half = config.adapter.kind != "none" and config.training.precision != "fp32"
    return "bfloat16" if is_half else weight_dtype(config)
