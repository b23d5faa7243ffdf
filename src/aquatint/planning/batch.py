"""What `training.batch_size = "auto"` comes to: a number of pictures at once that divides those of a step."""

from __future__ import annotations

from bisect import bisect_left

from aquatint.config.schema import Config
from aquatint.models.sdxl.model import ModelSpec
from aquatint.planning.memory import Tracer, outside_bytes, training
from aquatint.planning.shapes import largest_bucket


def is_open(config: Config) -> bool:
    """Whether the batch size is still to be found."""
    return config.training.batch_size == "auto"


def batch_sizes(pictures_per_step: int) -> list[int]:
    """All that a step can be made of without a rest, the largest first."""
    return [size for size in range(pictures_per_step, 0, -1) if pictures_per_step % size == 0]


def with_batch_size(config: Config, size: int) -> Config:
    """The same pictures per step, so many at once."""
    section = config.training
    settled = section.model_copy(update={"batch_size": size, "accumulation_steps": section.per_step // size})
    return config.model_copy(update={"training": settled})


def largest_batch_size(config: Config, spec: ModelSpec, limit: int, tracer: Tracer | None = None) -> int:
    """The most pictures at once whose steps need no more than `limit` bytes by the plan; 1 if none do. Raises UsageError.

    All of a step at once may need less than half of them twice: with one pass, no gradient has to wait for the next.
    """
    tracer, size_hw = tracer or Tracer(spec), largest_bucket(config)

    def fits(size: int) -> bool:
        settled = with_batch_size(config, size)
        return training(settled, spec, tracer, size_hw).bytes + outside_bytes(settled) <= limit

    whole, *parts = batch_sizes(config.training.per_step)
    return whole if not parts or fits(whole) else parts[min(bisect_left(parts, True, key=fits), len(parts) - 1)]
