"""The optimizers of other libraries: where each is, and what has to be known of it. Needs neither torch nor the libraries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Literal

from aquatint.errors import UsageError

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Entry:
    """Where an optimizer is, and what it keeps.

    `extra` is what pip installs for it, or empty for torch. `names` are its words for our settings, `fixed` are settings of its own.
    `counters` are the numbers in its groups that go on from step to step. `layout` is how it keeps the state of a weight.
    """

    module: str
    kind: str
    extra: str = ""
    names: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    fixed: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    counters: tuple[str, ...] = ()
    layout: Literal["plain", "torchao", "bitsandbytes"] = "plain"

    @property
    def package(self) -> str:
        """The name that it is imported by."""
        return self.module.partition(".")[0]


ONE_BY_ONE = MappingProxyType({"foreach": False})  # all weights at once would take temporary tensors of the whole model's size
LIBRARY: Mapping[str, Entry] = MappingProxyType(
    {
        "muon": Entry("torch.optim", "Muon", names={"rate_scale": "adjust_lr_fn"}),
        "torch_adafactor": Entry("torch.optim", "Adafactor", names={"clip_threshold": "d"}, fixed=ONE_BY_ONE),
        "torchao_adamw8bit": Entry("torchao.optim", "AdamW8bit", "torchao", layout="torchao"),
        "torchao_adamw4bit": Entry("torchao.optim", "AdamW4bit", "torchao", layout="torchao"),
        "torchao_adamw_fp8": Entry("torchao.optim", "AdamWFp8", "torchao", layout="torchao"),
        "bnb_adamw8bit": Entry("bitsandbytes.optim", "AdamW8bit", "bitsandbytes", layout="bitsandbytes"),
        "bnb_paged_adamw8bit": Entry("bitsandbytes.optim", "PagedAdamW8bit", "bitsandbytes", layout="bitsandbytes"),
        "bnb_lion8bit": Entry("bitsandbytes.optim", "Lion8bit", "bitsandbytes", layout="bitsandbytes"),
        "prodigy": Entry(
            "prodigyopt", "Prodigy", "optimizers", {"bias_correction": "use_bias_correction"}, counters=("k", "d", "d_max", "d_numerator")
        ),
        "schedule_free": Entry(
            "schedulefree", "AdamWScheduleFree", "optimizers", fixed=ONE_BY_ONE, counters=("k", "weight_sum", "lr_max")
        ),
        "lion": Entry("pytorch_optimizer", "Lion", "optimizers", fixed=ONE_BY_ONE, counters=("step",)),
        "came": Entry("pytorch_optimizer", "CAME", "optimizers", fixed=ONE_BY_ONE, counters=("step",)),
    }
)  # fmt: skip


def missing_package(name: str) -> tuple[str, str] | None:
    """What is wrong and what to do if the library of an optimizer is not installed; None if it is, or if the optimizer is ours."""
    entry = LIBRARY.get(name)
    if entry is None or find_spec(entry.package) is not None:
        return None
    message = f'the package {entry.package} is not installed, and it is needed for `optimizer.name = "{name}"`'
    return message, f"`pip install 'aquatint[{entry.extra}]'`, or choose an optimizer of ours: docs/optimizers.md"


def check_installed(name: str) -> None:
    """Raises UsageError if the library of an optimizer is not installed."""
    if (missing := missing_package(name)) is not None:
        raise UsageError(missing[0], hint=missing[1])
