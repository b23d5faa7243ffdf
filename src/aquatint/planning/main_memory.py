"""Main memory that a run takes beside the GPU's, or on a CPU beside its own: sums over shapes alone.

Files that the system keeps in memory are not counted: it drops them when memory is short. The libraries that a GPU needs in main memory
were not measured.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod

from aquatint.config.check import renders_online
from aquatint.config.schema import Config
from aquatint.models.sdxl.model import ModelSpec
from aquatint.planning.disk import checkpoint_bytes
from aquatint.planning.kept import DTYPE_BYTES, swapped_bytes
from aquatint.planning.memory import FLOAT32_BYTES, PROCESS_BYTES, MemoryPlan, Part, gib, has_average, makes_samples, on_gpu, state_parts
from aquatint.planning.schedule import count
from aquatint.planning.shapes import largest_bucket
from aquatint.planning.trace import PX_PER_LATENT, TOKENS
from aquatint.planning.trained import unet_dtype

WORKER_BYTES = 200 << 20  # of a process that reads ahead: 16 MiB of its own and 145 shared at the start; a guess on the safe side
PINNED_BATCHES = 2  # on their way to the GPU


@dataclass(frozen=True)
class MainMemory:
    """What is there at the same time, and `copy`: the bytes of a copy of a checkpoint, which is only made where there is room."""

    parts: tuple[Part, ...]
    copy: int

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


def plan_main_memory(config: Config, spec: ModelSpec, plan: MemoryPlan | None = None) -> MainMemory:
    """The main memory of a run at its fullest. On a CPU `plan` says what the run itself takes. Raises UsageError."""
    ahead = _read_ahead(config, spec)
    copies = config.checkpoints.background is True or (config.checkpoints.background == "auto" and on_gpu(config))
    copy = checkpoint_bytes(config, spec) if copies else 0
    if not on_gpu(config):
        itself = (Part("the run itself", plan.needed, "as above"),) if plan is not None else ()
        return MainMemory((*itself, *ahead), copy)
    program = Part("program", PROCESS_BYTES, "without the GPU's libraries")
    loading = Part("UNet", spec.num_parameters("unet") * DTYPE_BYTES[unet_dtype(config)], "until it is on the GPU")
    later = (*_kept_there(config, spec), *_set_aside(config, spec), *ahead)
    return MainMemory((program, *max((loading,), later, key=lambda parts: sum(part.bytes for part in parts))), copy)


def _kept_there(config: Config, spec: ModelSpec) -> tuple[Part, ...]:
    """What the config moves from the GPU to main memory."""
    _, state, average = state_parts(config, spec)
    found = []
    if config.ema.enabled and config.ema.device == "cpu":
        found.append(average)
    if config.memory.optimizer_state == "cpu":
        found.append(state)
    if blocks := swapped_bytes(config, spec):
        found.append(Part("frozen blocks that wait", sum(blocks), count(len(blocks), "block")))
    return tuple(found)


def _set_aside(config: Config, spec: ModelSpec) -> tuple[Part, ...]:
    """The trained weights, while the average is in their place."""
    looks = makes_samples(config) or config.validation.every is not None
    weights = Part("weights set aside", state_parts(config, spec)[0].bytes, "while the average is measured or makes pictures")
    return (weights,) if looks and has_average(config) else ()


def _read_ahead(config: Config, spec: ModelSpec) -> tuple[Part, ...]:
    """Batches of the largest bucket that wait, and the processes that read them."""
    (height, width), workers = largest_bucket(config), config.loader.workers
    latents = 2 * prod((spec.unet["in_channels"], height // PX_PER_LATENT, width // PX_PER_LATENT)) * FLOAT32_BYTES  # and their noise
    text = (TOKENS * spec.unet["cross_attention_dim"] + spec.text_encoder_2["projection_dim"]) * DTYPE_BYTES[config.cache.text_dtype]
    picture = latents + (0 if renders_online(config) else text)
    waiting = max(1, workers * config.loader.prefetch) + (PINNED_BATCHES if on_gpu(config) else 0)
    kept = (config.cache.memory_mib << 20) * max(1, workers)
    batches = Part(
        "batches read ahead", picture * config.training.at_once * waiting + kept, f"{waiting} batches of {config.training.at_once}"
    )
    return (batches, Part("processes that read them", workers * WORKER_BYTES, count(workers, "worker"))) if workers else (batches,)


def machine_bytes() -> int | None:
    """The main memory of this machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system, or one that does not know it
        return None


def shortage(found: MainMemory, machine: int | None) -> str | None:
    """That a machine with so much has too little, in words; None if it has enough, or if that is not known."""
    if machine is None or found.bytes <= machine:
        return None
    return f"the run takes {gib(found.bytes)} of main memory, and this machine has {gib(machine)}"
