"""From a name and settings to an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch.nn import Parameter

from aquatint.optim.adafactor import Adafactor
from aquatint.optim.adamw import AdamW
from aquatint.optim.adamw8bit import AdamW8bit
from aquatint.optim.adamw_bf16 import AdamWBF16
from aquatint.optim.groups import GroupSettings
from aquatint.optim.library import LIBRARY
from aquatint.optim.library_optimizer import LibraryOptimizer, create_library_optimizer
from aquatint.optim.soap import Soap
from aquatint.optim.tensorwise import TensorwiseOptimizer

OURS: Mapping[str, Callable[..., TensorwiseOptimizer]] = MappingProxyType(
    {"adamw_bf16": AdamWBF16, "adamw8bit": AdamW8bit, "adafactor": Adafactor, "soap": Soap}
)


AnyOptimizer = AdamW | TensorwiseOptimizer | LibraryOptimizer
Named = Sequence[tuple[str, Parameter]]
Own = Mapping[str, GroupSettings]  # tensors that are trained in a way of their own, by name
NONE: Own = MappingProxyType({})


def parameter_groups(named_parameters: Iterable[tuple[str, Parameter]], weight_decay: float, own: Own = NONE) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: matrices and convolutions with weight decay, norms and biases (one dimension) without.

    Tensors with the same settings of their `own` share such a pair of groups; `factor` multiplies the learning rate of each group.
    Names go along, so that each group of the optimizer has its `param_names`. A group without members is left out.
    """
    alike: dict[GroupSettings, list[tuple[str, Parameter]]] = {}
    for name, param in named_parameters:
        alike.setdefault(own.get(name, GroupSettings(1.0, weight_decay)), []).append((name, param))
    return [group for settings, named in alike.items() for group in _by_dimension(named, settings)]


def _by_dimension(named: Named, settings: GroupSettings) -> list[dict[str, Any]]:
    decayed = {"params": [(name, param) for name, param in named if param.dim() >= 2], "weight_decay": settings.weight_decay}
    others = {"params": [(name, param) for name, param in named if param.dim() < 2], "weight_decay": 0.0}
    return [{**group, "factor": settings.factor} for group in (decayed, others) if group["params"]]


def idle_steps(name: str) -> int:
    """How many of its first steps an optimizer only gets ready in, and moves no matrix."""
    return 1 if name == "soap" else 0


def create_optimizer(
    name: str,
    named_parameters: Iterable[tuple[str, Parameter]],
    *,
    seed: int,
    learning_rate: float,
    weight_decay: float,
    own: Own = NONE,
    **settings: Any,
) -> AnyOptimizer:
    """The optimizer called `name`, over the groups of `parameter_groups`; `settings` are its own, `seed` keys its rounding.

    All but those of libraries can be stepped tensor by tensor too. Raises ValueError for a name that there is not, and UsageError
    if its library is not installed.
    """
    groups = parameter_groups(named_parameters, weight_decay, own)
    if name == "adamw":
        return AdamW(groups, lr=learning_rate, **settings)
    if name in OURS:
        return OURS[name](groups, lr=learning_rate, seed=seed, **settings)
    if name in LIBRARY:
        return create_library_optimizer(name, groups, learning_rate=learning_rate, **settings)
    raise ValueError(f"unknown optimizer {name!r}; there are adamw, {', '.join((*OURS, *LIBRARY))}")
