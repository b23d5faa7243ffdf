"""What a run holds in memory at once, from the config and the shapes of the networks alone: no weights, no GPU.

Weights, optimizer state and average are sums over shapes. Gradients and activations come from a pass of the real networks on
tensors without memory (see `trace`). On a GPU, what stays out is the driver and the libraries (half a GiB to one), and what the
allocator cannot use; with `training.device = "cpu"` it is the program itself. Both are added as a number of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import TYPE_CHECKING, Any, TypeVar

from aquatint.config.check import encodes_online
from aquatint.config.schema import Config
from aquatint.config.text_rules import trains_text
from aquatint.models.sdxl.model import ModelSpec
from aquatint.optim.sizes import state_bytes
from aquatint.planning.kept import (
    DTYPE_BYTES,
    compact_layers_of,
    frozen_bytes,
    frozen_of_groups,
    half_frozen,
    made_bytes,
    optimizer_room_bytes,
    swap_room_bytes,
    swapped_bytes,
)
from aquatint.planning.shapes import largest_bucket, sample_size
from aquatint.planning.trained import (
    adapter_spec,
    num_frozen,
    num_frozen_text,
    num_trained,
    trained_encoders,
    trained_shapes,
    unet_dtype,
    weight_dtype,
)

if TYPE_CHECKING:
    from aquatint.planning.trace import PassCost, StepCost

T = TypeVar("T")
GIB = 1 << 30
FLOAT32_BYTES = 4
SAMPLE_BATCH = 8  # prompts that are sampled at once
OUTSIDE_BYTES = 3 * GIB // 2  # driver, libraries, and room that the allocator cannot use: a guess on the safe side
PROCESS_BYTES = 6 * GIB // 10  # of main memory: Python, torch, diffusers and transformers, and what they take for themselves
UPDATE_BYTES = {  # of temporary tensors while a weight is stepped on a GPU by plain torch, per element: bfloat16 weights, float32 ones
    "adamw": (0, 0), "adamw_bf16": (30, 20), "adamw8bit": (32, 31), "adafactor": (15, 9), "soap": (34, 24),
    "muon": (12, 12), "schedule_free": (4, 4), "prodigy": (4, 4), "lion": (4, 4), "came": (8, 8), "torch_adafactor": (4, 4),
    "bnb_adamw8bit": (0, 0), "bnb_paged_adamw8bit": (0, 0), "bnb_lion8bit": (0, 0),
    "torchao_adamw8bit": (32, 32), "torchao_adamw4bit": (32, 32), "torchao_adamw_fp8": (32, 32),  # as not compiled: the most it can be
}  # fmt: skip
KAHAN_BYTES = 40
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
    """The phases of a run, of which the largest decides. `size_hw` is the largest bucket, in pixels.

    `outside` is what is needed beside every phase. `on_gpu` says whose memory it is: the GPU's, or the process's main memory.
    """

    phases: tuple[Phase, ...]
    size_hw: tuple[int, int]
    outside: int = OUTSIDE_BYTES
    on_gpu: bool = True

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def needed(self) -> int:
        """The memory that the run takes, all in all."""
        return self.largest.bytes + self.outside

    @property
    def card_gib(self) -> int | None:
        """The smallest usual card that should do, or None if none does."""
        return next((size for size in CARD_GIB if self.needed <= size * GIB), None)


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
            "dtype": getattr(torch, unet_dtype(config)), "autocast": training.precision == "bf16_mixed", "size_hw": size_hw,
            "checkpointing": training.gradient_checkpointing, "batch_size": training.at_once,
            "accumulating": training.accumulation_steps > 1, "fused_backward": training.fused_backward,
            "adapter": adapter_spec(config), "adapter_dtype": getattr(torch, weight_dtype(config)),
            "frozen": frozen_of_groups(config, self.spec), "halved": half_frozen(config, self.spec),
            "compact": (tuple(compact_layers_of(config, self.spec)), config.memory.frozen_format),
            "texts": trained_encoders(config), "kernels": config.speed.kernels, "on_gpu": on_gpu(config),
        }  # fmt: skip
        cost = self._once(trace_step, settings)
        if training.fused_backward:
            return replace(cost, peak=cost.peak_with(update_bytes(config)))
        counts = list(map(prod, trained_shapes(config, self.spec).values()))
        step = sum(counts) * DTYPE_BYTES[weight_dtype(config)] + max(counts) * update_bytes(config)  # when the activations are gone
        return replace(cost, peak=max(cost.peak, step))

    def validate(self, config: Config, size_hw: tuple[int, int]) -> PassCost:
        """A pass without gradients on a batch of held-out pictures, in the UNet's own number format."""
        import torch

        from aquatint.planning.trace import trace_unet

        settings = {"dtype": getattr(torch, unet_dtype(config)), "batch_size": config.training.at_once, "size_hw": size_hw}
        return self._once(trace_unet, settings)

    def denoise(self, config: Config) -> PassCost:
        """One denoising pass on one sample picture, in float32: the bytes grow with the batch and with those of a number."""
        import torch

        from aquatint.planning.trace import trace_unet

        return self._once(trace_unet, {"dtype": torch.float32, "batch_size": 1, "size_hw": sample_size(config)})

    def decode(self, config: Config) -> PassCost:
        """Decoding a sample picture."""
        import torch

        from aquatint.planning.trace import trace_decode

        return self._once(trace_decode, {"dtype": torch.float32, "size_hw": sample_size(config)})

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
    captions = [] if trains_text(config) else [_encoding_captions(spec)]
    phases = [*captions, encoding_pictures(config, spec, tracer, size_hw), training(config, spec, tracer, size_hw)]
    if not on_gpu(config) and has_average(config) and config.validation.every is not None:
        phases.append(_validating(config, spec, tracer, size_hw))
    if makes_samples(config):
        phases.append(sampling(config, spec, tracer))
    return MemoryPlan(tuple(phases), size_hw, outside_bytes(config), on_gpu(config))


def on_gpu(config: Config) -> bool:
    """Whether the run is planned for a GPU: for every device but the CPU, also on a computer that has none."""
    return config.training.device != "cpu"


def outside_bytes(config: Config) -> int:
    """What is needed beside every phase."""
    return OUTSIDE_BYTES if on_gpu(config) else PROCESS_BYTES


def update_bytes(config: Config) -> int:
    """Temporary bytes per element while a weight is stepped. A CPU steps in pieces too small to count."""
    if not on_gpu(config):
        return 0
    optimizer, is_half = config.optimizer, weight_dtype(config) == "bfloat16"
    if is_half and optimizer.name == "adamw_bf16" and optimizer.rounding == "kahan":
        return KAHAN_BYTES
    return UPDATE_BYTES[optimizer.name][0 if is_half else 1]


def makes_samples(config: Config) -> bool:
    """Whether pictures are made during the run."""
    return config.samples.every is not None and bool(config.samples.prompts)


def has_average(config: Config) -> bool:
    """Whether an average of the weights is looked at: a moving one, or that of schedule-free training, which is no more memory."""
    return config.ema.enabled or config.optimizer.name == "schedule_free"


def state_parts(config: Config, spec: ModelSpec) -> tuple[Part, Part, Part]:
    """Trained weights, optimizer state and moving average, wherever they live: what a checkpoint holds."""
    dtype, parameters = weight_dtype(config), num_trained(config, spec)
    name = "weights" if config.adapter.kind == "none" else "adapter weights"
    weights = Part(name, parameters * DTYPE_BYTES[dtype], f"{parameters / 1e6:,.0f} million, {dtype}")
    settings = config.optimizer.model_dump(exclude={"name"})
    state = state_bytes(config.optimizer.name, trained_shapes(config, spec), DTYPE_BYTES[dtype], **settings)
    optimizer = Part("optimizer state", state, config.optimizer.name)
    count = 1 + len(config.ema.power_stds) if config.ema.enabled else 0
    average = Part("moving average", parameters * FLOAT32_BYTES * count, f"{count} of them, float32" if count > 1 else "float32")
    return weights, optimizer, average


def resident_parts(config: Config, spec: ModelSpec) -> tuple[Part, ...]:
    """What stays in memory from step to step."""
    weights, optimizer, average = state_parts(config, spec)
    has_average = config.ema.enabled and (config.ema.device == "model" or not on_gpu(config))
    if config.memory.optimizer_state == "cpu":
        room = Part("room for optimizer state", optimizer_room_bytes(config, spec), "the rest is in main memory")
        optimizers = (room,) if on_gpu(config) else (optimizer, room)
    else:
        optimizers = (optimizer,)
    trained = (weights, *optimizers, *((average,) if has_average else ()))
    frozen = (frozen_part(config, spec),) if num_frozen(config, spec) else ()
    if config.memory.swapped_blocks:
        frozen += swapped_parts(config, spec)
    if texts := num_frozen_text(config, spec):
        dtype = unet_dtype(config)
        frozen += (Part("frozen text encoders", texts * DTYPE_BYTES[dtype], f"{texts / 1e6:,.0f} million, {dtype}"),)
    has_prior = config.diffusion.mask_prior_weight > 0 and config.adapter.kind == "none"  # an adapter is beside what it needs
    return (*frozen, *trained, *((_prior_part(config, spec),) if has_prior else ()))


def frozen_part(config: Config, spec: ModelSpec) -> Part:
    """The UNet that an adapter is beside, or what groups freeze of it: no gradients, no state, no average."""
    dtype, parameters, is_whole = unet_dtype(config), num_frozen(config, spec), config.adapter.kind != "none"
    name = "frozen UNet" if is_whole else "frozen weights"
    how = f"{dtype} and {config.memory.frozen_format}" if config.memory.frozen_format != "own" else dtype
    how += " and bfloat16" if half_frozen(config, spec) else ""
    return Part(name, frozen_bytes(config, spec), f"{parameters / 1e6:,.0f} million, {how}")


def swapped_parts(config: Config, spec: ModelSpec) -> tuple[Part, ...]:
    """What frozen blocks take that wait in main memory: room for two of them, and on a CPU all of them beside it."""
    blocks = swapped_bytes(config, spec)
    room = Part("room for two frozen blocks", swap_room_bytes(config, spec), f"{len(blocks)} in main memory")
    return (room,) if on_gpu(config) else (room, Part("frozen blocks that wait", sum(blocks), ""))


def _prior_part(config: Config, spec: ModelSpec) -> Part:
    """The UNet as it was, which says what is to stay outside of masks."""
    dtype = "float32" if config.training.precision == "fp32" else "bfloat16"
    return Part("base model, for masks", spec.num_parameters("unet") * DTYPE_BYTES[dtype], dtype)


def step_parts(config: Config, spec: ModelSpec) -> tuple[Part, ...]:
    """What is in memory during a step beside gradients and activations."""
    is_beside = encodes_online(config.captions) and not trains_text(config)
    return (*resident_parts(config, spec), *(_encoding_captions(spec).parts if is_beside else ()))


def training(config: Config, spec: ModelSpec, tracer: Tracer, size_hw: tuple[int, int]) -> Phase:
    """The steps. Raises UsageError."""
    traced = tracer.step(config, size_hw)
    weights, weight_bytes = num_trained(config, spec), DTYPE_BYTES[weight_dtype(config)]
    freed = config.training.fused_backward and config.training.accumulation_steps == 1
    gradients = "gradients freed one by one" if freed else f"gradients {gib(weights * weight_bytes)}"
    alone = [gradients, f"activations {gib(traced.activations)}"]
    if config.training.precision == "bf16_mixed":  # of what is trained: a frozen UNet is bf16 itself, and frozen weights go as they come
        alone.append(f"bf16 copies {gib(weights * DTYPE_BYTES['bfloat16'])}")
    note = f"at the same time; alone: {', '.join(alone)}"
    return Phase("training", (*step_parts(config, spec), Part("gradients and activations", traced.peak, note)))


def sampling(config: Config, spec: ModelSpec, tracer: Tracer) -> Phase:
    """Sample pictures between two steps. Raises UsageError."""
    vae = Part("autoencoder", spec.num_parameters("vae") * FLOAT32_BYTES, "float32")
    at_once = min(SAMPLE_BATCH, len(config.samples.prompts))
    is_half = unet_dtype(config) == "bfloat16" or config.training.precision == "bf16_mixed"
    denoise = ceil(tracer.denoise(config).peak * at_once * (0.5 if is_half else 1)) + _half_copies(config, spec)
    denoise += made_bytes(config, spec)
    work = Part("work space", max(denoise, tracer.decode(config).peak), f"{at_once} at once")
    return Phase("making sample pictures", (*resident_parts(config, spec), *_set_aside(config, spec), vae, work))


def _half_copies(config: Config, spec: ModelSpec) -> int:
    """The bf16 copies of float32 weights that autocast keeps during a pass."""
    return num_trained(config, spec) * DTYPE_BYTES["bfloat16"] if config.training.precision == "bf16_mixed" else 0


def _set_aside(config: Config, spec: ModelSpec) -> tuple[Part, ...]:
    """The trained weights, which are kept in main memory while the average is in their place."""
    weights = state_parts(config, spec)[0]
    return (Part("weights set aside", weights.bytes, weight_dtype(config)),) if has_average(config) and not on_gpu(config) else ()


def _validating(config: Config, spec: ModelSpec, tracer: Tracer, size_hw: tuple[int, int]) -> Phase:
    """Less than a step on a GPU, where no weights are set aside, and so of interest on a CPU alone."""
    work = Part("work space", tracer.validate(config, size_hw).peak + _half_copies(config, spec), f"{config.training.at_once} at once")
    return Phase("validating", (*resident_parts(config, spec), *_set_aside(config, spec), work))


def encoding_pictures(config: Config, spec: ModelSpec, tracer: Tracer, size_hw: tuple[int, int]) -> Phase:
    """Filling the cache. Raises UsageError."""
    precision = config.cache.vae_precision
    vae = Part("autoencoder", spec.num_parameters("vae") * DTYPE_BYTES[precision], precision)
    work = Part("work space", tracer.encode(config, size_hw).peak, f"{config.cache.batch_size} at once")
    return Phase("encoding pictures", (vae, work))


def _encoding_captions(spec: ModelSpec) -> Phase:
    """The work space of a few captions is too small to count."""
    parameters = spec.num_parameters("text_encoder") + spec.num_parameters("text_encoder_2")
    return Phase("encoding captions", (Part("text encoders", parameters * FLOAT32_BYTES, "float32"),))


def gib(value: float) -> str:
    """`9.56 GiB`."""
    return f"{value / GIB:.2f} GiB"
