"""The settings that trade memory for time or quality, the cheapest first: each with what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aquatint.config.schema import Config
from aquatint.config.sections.fields import NEVER
from aquatint.config.sections.library_optimizers import LIBRARY_NAMES, OWN_RATE
from aquatint.config.sections.methods import TextEncodersSection
from aquatint.config.template import to_toml
from aquatint.models.sdxl.shapes import is_text
from aquatint.planning.memory import makes_samples
from aquatint.planning.shapes import sample_size

Changes = Mapping[str, Any]  # section.key -> value
SAMPLE_STEP = 32  # pixels: sides of sample pictures are multiples
LARGEST_BATCH = 64  # that is ever offered instead of accumulation


@dataclass(frozen=True)
class Level:
    """One way to set a knob. `cost` is a judgement: about so many percent of the time, or a loss of quality that is as bad."""

    changes: Changes
    cost: int
    price: str


@dataclass(frozen=True)
class Knob:
    """Settings that are turned together. `levels` gives the ways to turn them from where a config has them, the cheapest first.

    `phases` are those of the plan that need less then.
    """

    name: str
    levels: Callable[[Config], tuple[Level, ...]]
    phases: tuple[str, ...]


def _encoding_at_once(config: Config) -> tuple[Level, ...]:
    found, size = [], config.cache.batch_size // 2
    while size:
        found.append(Level({"cache.batch_size": size}, len(found) + 1, "slower encoding, once"))
        size //= 2
    return tuple(found)


def _encoding_precision(config: Config) -> tuple[Level, ...]:
    is_exact = config.cache.vae_precision == "float32"
    return (Level({"cache.vae_precision": "bfloat16"}, 10, "latents slightly less exact"),) if is_exact else ()


def _sample_pictures(config: Config) -> tuple[Level, ...]:
    if not makes_samples(config):
        return ()
    found = []
    for share, cost in ((0.75, 1), (0.5, 2)):
        height, width = (max(SAMPLE_STEP, round(side * share / SAMPLE_STEP) * SAMPLE_STEP) for side in sample_size(config))
        found.append(Level({"samples.height": height, "samples.width": width}, cost, "smaller sample pictures"))
    return (*found, Level({"samples.every": None}, 12, "no pictures to look at while it trains"))


def fused_backward(config: Config) -> tuple[Level, ...]:
    """A step inside the backward pass, with a clip that it can do."""
    section = config.training
    if section.fused_backward:
        return ()
    if section.clip != "global" or section.clip_norm == 0:
        return (Level({"training.fused_backward": True}, 2, "gradients that are not finite leave out their own tensor alone"),)
    return (Level({"training.fused_backward": True, "training.clip": "delayed"}, 3, "clips by the norm of the step before"),)


def _optimizer(config: Config) -> tuple[Level, ...]:
    found = []
    if config.optimizer.name not in ("adamw8bit", "adafactor"):
        found.append(Level({"optimizer.name": "adamw8bit"}, 5, "moments in 8 bits"))
    if config.optimizer.name != "adafactor":
        found.append(Level({"optimizer.name": "adafactor"}, 25, "no momentum: find the learning rate again"))
    return tuple(found)


def _optimizer_state(config: Config) -> tuple[Level, ...]:
    """Of a whole UNet: beside an adapter it is small, and Adafactor's always is."""
    if config.adapter.kind != "none" or config.optimizer.name == "adafactor" or config.memory.optimizer_state == "cpu":
        return ()
    cost = 30 if config.optimizer.name == "adamw8bit" else 60
    return (Level({"memory.optimizer_state": "cpu"}, cost, "moments in main memory: each step moves all of them there and back"),)


def _frozen(config: Config) -> tuple[Level, ...]:
    """Of a UNet that an adapter is beside: fewer bits, and then its blocks in main memory."""
    if config.adapter.kind == "none":
        return ()
    int8, nf4, waiting = {"memory.frozen_format": "int8"}, {"memory.frozen_format": "nf4"}, {"memory.swapped_blocks": 1.0}
    few, fewer, slower = "frozen weights in 8 bits", "frozen weights in 4 bits", "and in main memory: slower steps"
    levels = (
        Level(int8, 8, few), Level(nf4, 15, fewer), Level({**int8, **waiting}, 40, f"{few}, {slower}"),
        Level({**nf4, **waiting}, 45, f"{fewer}, {slower}"),
    )  # fmt: skip
    now = {"memory.frozen_format": config.memory.frozen_format, "memory.swapped_blocks": config.memory.swapped_blocks}
    rank = ("own", "int8", "nf4").index
    return tuple(
        level
        for level in levels
        if {**now, **level.changes} != now and rank(level.changes["memory.frozen_format"]) >= rank(config.memory.frozen_format)
    )


def _batch(config: Config) -> tuple[Level, ...]:
    """Other ways to the same number of pictures per step: larger batches are no slower, smaller ones cost with each halving."""
    own, whole = config.training.at_once, config.training.per_step
    sizes = [size for size in range(1, whole + 1) if whole % size == 0 and size != own and size <= max(own, LARGEST_BATCH)]
    found = []
    for size in sizes:
        cost = 0 if size > own else 8 * ((own - 1) // size).bit_length()
        price = "no slower" if size > own else "smaller passes are slower; the pictures per step stay"
        found.append(Level({"training.batch_size": size, "training.accumulation_steps": whole // size}, cost, price))
    return tuple(sorted(found, key=lambda level: (level.cost, -level.changes["training.batch_size"])))


def _average(config: Config) -> tuple[Level, ...]:
    if not config.ema.enabled:
        return ()
    powers: Changes = {"ema.power_stds": ()} if config.ema.power_stds else {}
    off = Level({"ema.enabled": False, **powers}, 30, "no average: pictures and export are of the last weights")
    if config.ema.device == "cpu":
        return (off,)
    return (Level({"ema.device": "cpu"}, 15, "a second or so more per step, and its size in main memory"), off)


def _checkpointing(config: Config) -> tuple[Level, ...]:
    """What is pointwise is quickly computed again, but waits for memory and takes time to start."""
    now = config.training.gradient_checkpointing
    pointwise = Level({"training.gradient_checkpointing": "pointwise"}, 4, "a few per cent more time")
    whole = Level({"training.gradient_checkpointing": True}, 26, "about a quarter more time")
    return () if now is True else (whole,) if now else (pointwise, whole)


def _precision(config: Config) -> tuple[Level, ...]:
    """A frozen UNet is in bf16 already, and bf16 weights need an optimizer that rounds with care."""
    if config.training.precision == "bf16_pure" or config.adapter.kind != "none":
        return ()
    optimizer = {"optimizer.name": "adamw_bf16"} if config.optimizer.name in ("adamw", *LIBRARY_NAMES) else {}
    return (Level({"training.precision": "bf16_pure", **optimizer}, 20, "weights in bf16: small updates are rounded by chance"),)


def _text_encoders(config: Config) -> tuple[Level, ...]:
    """The UNet alone, unless a group is about a text encoder: it would fit nothing."""
    section, usual = config.text_encoders, TextEncodersSection()
    if not section.train or any(is_text(pattern) for group in config.training.groups for pattern in group.match):
        return ()
    changes = {f"text_encoders.{name}": value for name, value in usual.model_dump().items() if getattr(section, name) != value}
    return (Level(changes, 40, "the text encoders stay as they are"),)


STEPS = ("training", "validating")
WEIGHTS = (*STEPS, "making sample pictures")
KNOBS = (
    Knob("pictures encoded at once", _encoding_at_once, ("encoding pictures",)),
    Knob("precision of encoding", _encoding_precision, ("encoding pictures",)),
    Knob("sample pictures", _sample_pictures, ("making sample pictures",)),
    Knob("step inside the backward pass", fused_backward, STEPS),
    Knob("batch and accumulation", _batch, STEPS),
    Knob("text encoders", _text_encoders, WEIGHTS),
    Knob("moving average", _average, WEIGHTS),
    Knob("precision of weights", _precision, WEIGHTS),
    Knob("optimizer", _optimizer, WEIGHTS),
    Knob("place of the optimizer's state", _optimizer_state, WEIGHTS),
    Knob("frozen weights", _frozen, WEIGHTS),
    Knob("gradient checkpointing", _checkpointing, STEPS),
)
"""In the order in which changes are put together: an optimizer that was chosen stands above the one that a precision brings along."""


def with_changes(config: Config, changes: Changes) -> Config:
    """The config with some settings changed. Another optimizer starts from its own defaults, but for a rate that means the same."""
    values = config.model_dump()
    for key, value in changes.items():
        section, name = key.split(".")
        if key == "optimizer.name" and values["optimizer"]["name"] != value:
            same = {} if values["optimizer"]["name"] in OWN_RATE else {"learning_rate": values["optimizer"]["learning_rate"]}
            values["optimizer"] = same
        values[section][name] = value
    return Config.model_validate(values)


def changes_text(changes: Changes) -> str:
    """`training.batch_size=1 training.accumulation_steps=4`, as a command line takes it."""
    return " ".join(f"{key}={value_text(value)}" for key, value in changes.items())


def value_text(value: Any) -> str:
    """A value as an override."""
    if value is None:
        return NEVER
    return value if isinstance(value, str) else to_toml(value)
