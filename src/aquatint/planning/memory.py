"""What a run holds in memory at once, from the config and the shapes of the networks alone: no weights, no GPU.

Weights, optimizer state and average are sums over shapes. Activations come from a pass of the real networks on tensors
without memory (see `trace`). What stays out: the driver and the libraries (half a GiB to one), and what the allocator
cannot use; the plan says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from aquatint.config.check import encodes_online
from aquatint.config.schema import Config
from aquatint.models.sdxl.model import ModelSpec
from aquatint.planning.shapes import largest_bucket

if TYPE_CHECKING:
    from aquatint.planning.trace import PassCost, StepCost

T = TypeVar("T")
GIB = 1 << 30
FLOAT32_BYTES = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SAMPLE_BATCH = 8  # prompts that are sampled at once
OUTSIDE_BYTES = 1.5 * GIB  # driver, libraries, and room that the allocator cannot use: a guess on the safe side
CARD_GIB = (8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 141, 180)


@dataclass(frozen=True)
class Part:
    """Something that takes memory. `note` says how the number comes about."""

    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Phase:
    """What is in memory at the same time."""

    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class MemoryPlan:
    """The phases of a run, of which the largest decides. `size_hw` is the largest bucket, in pixels."""

    phases: tuple[Phase, ...]
    size_hw: tuple[int, int]

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def card_gib(self) -> int | None:
        """The smallest usual card that should do, or None if none does."""
        return next((size for size in CARD_GIB if self.largest.bytes + OUTSIDE_BYTES <= size * GIB), None)


class Tracer:
    """Traces of one model, each made once."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._known: dict[tuple[Any, ...], Any] = {}

    def step(self, config: Config, size_hw: tuple[int, int]) -> StepCost:
        """A training pass on one batch."""
        import torch

        from aquatint.planning.trace import trace_step

        training = config.training
        settings = {
            "dtype": getattr(torch, weight_dtype(config)), "autocast": training.precision == "bf16_mixed", "size_hw": size_hw,
            "checkpointing": training.gradient_checkpointing, "batch_size": training.batch_size,
            "accumulating": training.accumulation_steps > 1,
        }  # fmt: skip
        return self._once(trace_step, settings)

    def denoise(self, config: Config) -> PassCost:
        """One denoising pass on one sample picture, in float32: the bytes grow with the batch and with those of a number."""
        import torch

        from aquatint.planning.trace import trace_unet

        size_hw = (config.samples.height, config.samples.width)
        return self._once(trace_unet, {"dtype": torch.float32, "batch_size": 1, "size_hw": size_hw})

    def decode(self, config: Config) -> PassCost:
        """Decoding a sample picture."""
        import torch

        from aquatint.planning.trace import trace_decode

        return self._once(trace_decode, {"dtype": torch.float32, "size_hw": (config.samples.height, config.samples.width)})

    def encode(self, config: Config, size_hw: tuple[int, int]) -> PassCost:
        """Encoding a batch of pictures for the cache."""
        import torch

        from aquatint.planning.trace import trace_encode

        dtype = getattr(torch, config.cache.vae_precision)
        return self._once(trace_encode, {"dtype": dtype, "batch_size": config.cache.batch_size, "size_hw": size_hw})

    def _once(self, function: Callable[..., T], settings: Mapping[str, Any]) -> T:
        key = (function.__name__, *settings.items())
        if key not in self._known:
            self._known[key] = function(self.spec, **settings)
        known: T = self._known[key]
        return known


def plan_memory(config: Config, spec: ModelSpec, tracer: Tracer | None = None) -> MemoryPlan:
    """The memory of every phase of a run. `tracer` can be shared by plans of the same model. Raises UsageError."""
    tracer = tracer or Tracer(spec)
    size_hw = largest_bucket(config)
    phases = [_encoding_captions(spec), _encoding_pictures(config, spec, tracer, size_hw), _training(config, spec, tracer, size_hw)]
    if makes_samples(config):
        phases.append(_sampling(config, spec, tracer))
    return MemoryPlan(tuple(phases), size_hw)


def makes_samples(config: Config) -> bool:
    """Whether pictures are made during the run."""
    return config.samples.every is not None and bool(config.samples.prompts)


def weight_dtype(config: Config) -> str:
    """The number format of the trained weights."""
    return "bfloat16" if config.training.precision == "bf16_pure" else "float32"


def state_parts(config: Config, spec: ModelSpec) -> tuple[Part, Part, Part]:
    """Weights, optimizer state and moving average, wherever they live: what a checkpoint holds."""
    from aquatint.optim.create import state_bytes

    dtype, parameters = weight_dtype(config), spec.num_parameters("unet")
    weights = Part("weights", parameters * DTYPE_BYTES[dtype], f"{parameters / 1e6:,.0f} million, {dtype}")
    state = state_bytes(config.optimizer.name, spec.shapes("unet").values(), DTYPE_BYTES[dtype])
    optimizer = Part("optimizer state", state, config.optimizer.name)
    average = Part("moving average", parameters * FLOAT32_BYTES if config.ema.enabled else 0, "float32")
    return weights, optimizer, average


def _resident(config: Config, spec: ModelSpec) -> tuple[Part, ...]:
    """What stays on the GPU from step to step."""
    weights, optimizer, average = state_parts(config, spec)
    return (weights, optimizer, average) if config.ema.enabled and config.ema.device == "model" else (weights, optimizer)


def _training(config: Config, spec: ModelSpec, tracer: Tracer, size_hw: tuple[int, int]) -> Phase:
    traced = tracer.step(config, size_hw)
    texts = _encoding_captions(spec).parts if encodes_online(config.captions) else ()
    weights = spec.num_parameters("unet")
    alone = [f"gradients {gib(weights * DTYPE_BYTES[weight_dtype(config)])}", f"activations {gib(traced.activations)}"]
    if config.training.precision == "bf16_mixed":
        alone.append(f"bf16 copies of the weights {gib(weights * DTYPE_BYTES['bfloat16'])}")
    note = f"the most at one time; alone: {', '.join(alone)}"
    return Phase("training", (*_resident(config, spec), *texts, Part("gradients and activations", traced.peak, note)))


def _sampling(config: Config, spec: ModelSpec, tracer: Tracer) -> Phase:
    vae = Part("autoencoder", spec.num_parameters("vae") * FLOAT32_BYTES, "float32")
    at_once = min(SAMPLE_BATCH, len(config.samples.prompts))
    denoise = tracer.denoise(config).peak * at_once * DTYPE_BYTES[weight_dtype(config)] // FLOAT32_BYTES
    work = Part("work space", max(denoise, tracer.decode(config).peak), f"{at_once} at once")
    return Phase("making sample pictures", (*_resident(config, spec), vae, work))


def _encoding_pictures(config: Config, spec: ModelSpec, tracer: Tracer, size_hw: tuple[int, int]) -> Phase:
    precision = config.cache.vae_precision
    vae = Part("autoencoder", spec.num_parameters("vae") * DTYPE_BYTES[precision], precision)
    work = Part("work space", tracer.encode(config, size_hw).peak, f"{config.cache.batch_size} at once")
    return Phase("encoding pictures", (vae, work))


def _encoding_captions(spec: ModelSpec) -> Phase:
    """The work space of a few captions is too small to count."""
    parameters = spec.num_parameters("text_encoder") + spec.num_parameters("text_encoder_2")
    return Phase("encoding captions", (Part("text encoders", parameters * FLOAT32_BYTES, "float32"),))


@dataclass(frozen=True)
class Saving:
    """A change of the config, what it costs, and the memory that the run needs with it."""

    change: str
    price: str
    plan: MemoryPlan


_CHANGES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"ema.device": "cpu"}, "somewhat slower steps, and main memory"),
    ({"training.gradient_checkpointing": True}, "about a quarter more time"),
    ({"cache.batch_size": 1}, "slower encoding"),
    ({"cache.vae_precision": "bfloat16"}, "latents slightly less exact"),
    ({"optimizer.name": "adafactor"}, "another optimizer: find its learning rate again"),
    ({"training.precision": "bf16_pure", "optimizer.name": "adamw_bf16"}, "weights and moments in bf16"),
    ({"training.precision": "bf16_pure", "optimizer.name": "adafactor", "ema.device": "cpu"}, "all of these together"),
)


def savings(config: Config, spec: ModelSpec, tracer: Tracer) -> tuple[Saving, ...]:
    """Changes that would make the run need less memory, the least painful first."""
    before = plan_memory(config, spec, tracer).largest.bytes
    found = []
    for change, price in _CHANGES:
        changed = with_changes(config, change)
        if changed == config:
            continue
        plan = plan_memory(changed, spec, tracer)
        if plan.largest.bytes < before:
            found.append(Saving(", ".join(f"{key} = {value}" for key, value in change.items()), price, plan))
    return tuple(found)


def with_changes(config: Config, change: Mapping[str, Any]) -> Config:
    """The config with some settings changed. Another optimizer starts from its own defaults, but for the learning rate."""
    values = config.model_dump()
    for key, value in change.items():
        section, name = key.split(".")
        if key == "optimizer.name" and values["optimizer"]["name"] != value:
            values["optimizer"] = {"learning_rate": values["optimizer"]["learning_rate"]}
        values[section][name] = value
    return Config.model_validate(values)


def gib(value: float) -> str:
    """`9.56 GiB`."""
    return f"{value / GIB:.2f} GiB"
