"""How long a run takes: its arithmetic, what that means on a few cards, and the measured speed as soon as there is one.

What a network computes is known exactly; how much of a card's peak a step reaches is not, so the share is assumed and said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aquatint.config.schema import Config
from aquatint.data.buckets import MIN_AREA_SHARE
from aquatint.planning.disk import views_per_picture
from aquatint.planning.memory import Tracer, has_average, makes_samples
from aquatint.planning.schedule import StepPlan, count, expected_held_out, number
from aquatint.planning.shapes import largest_bucket
from aquatint.planning.trained import unet_dtype
from aquatint.tracking.files import read_rows

TERA = 1e12
ASSUMED_SHARE = 0.3  # of the peak; the best published training of such networks reaches 28 to 35 %


@dataclass(frozen=True)
class Card:
    """`peak` in TFLOP/s: dense bf16 products summed in float32, from the makers' data sheets."""

    name: str
    peak: float


CARDS = (Card("RTX 3090", 71), Card("RTX 4090", 165), Card("RTX 5090", 210), Card("A100", 312), Card("H100, H200", 989))


@dataclass(frozen=True)
class Work:
    """The floating-point operations of a run. `forward` and `sample` are of one sample, without and with the backward pass."""

    forward: float
    sample: float
    samples_per_step: int
    steps: int

    @property
    def step(self) -> float:
        return self.sample * self.samples_per_step

    @property
    def run(self) -> float:
        return self.step * self.steps


@dataclass(frozen=True)
class Extra:
    """Work beside the steps: `flops`, and in words when it is done and how it comes about."""

    name: str
    how: str
    flops: float


@dataclass(frozen=True)
class Speed:
    """What was measured: the steps after `first` up to `last` took `seconds`. `done` is the last step of the run so far."""

    first: int
    last: int
    seconds: float
    done: int

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / (self.last - self.first)


def forecast_lines(config: Config, tracer: Tracer, plan: StepPlan, num_pictures: int, apart: int = 0) -> list[str]:
    """The arithmetic of the run, then the measured time if there is one, and a forecast if not. Raises StorageError.

    `num_pictures` are all that are found, `apart` those of them in sources for validation.
    """
    size_hw, folder = largest_bucket(config), config.run.folder / config.run.name
    work = plan_work(config, tracer, size_hw, plan)
    lines = work_lines(work, size_hw, recomputes=config.training.gradient_checkpointing is True)
    speed = measured_speed(read_timings(folder / "timings.jsonl"))
    if speed is not None:
        return [*lines, "", *speed_lines(speed, work, folder)]
    if config.training.precision == "fp32":
        return [*lines, "", "there is no forecast for `training.precision = fp32`, which takes several times as long as bf16"]
    return [*lines, "", *card_lines(work), "", *extra_lines(plan_extras(config, tracer, size_hw, work, num_pictures, apart), work)]


def plan_work(config: Config, tracer: Tracer, size_hw: tuple[int, int], plan: StepPlan) -> Work:
    """What training computes, every sample taken as one of the largest bucket, with a caption of one chunk."""
    cost, batch_size = tracer.step(config, size_hw), config.training.at_once
    return Work(cost.forward_flops / batch_size, cost.flops / batch_size, plan.samples_per_step, plan.steps)


def plan_extras(config: Config, tracer: Tracer, size_hw: tuple[int, int], work: Work, num_pictures: int, apart: int = 0) -> list[Extra]:
    """Encoding, validation and sample pictures, as far as the run has them."""
    encode, views = tracer.encode(config, size_hw).flops / config.cache.batch_size, views_per_picture(config) * num_pictures
    what = f"{count(views, 'view')} × {tflop(encode)}, in {config.cache.vae_precision}"
    extras = [Extra("encoding what is not in the cache", what, views * encode)]
    if config.validation.every is not None:
        held_out, levels = validation_pictures(config, num_pictures, apart), config.validation.timesteps
        known = config.validation.train_pictures if apart or config.validation.share else 0
        pictures = held_out * (2 if has_average(config) else 1) + known
        twice = " × 2 (average and raw)" if has_average(config) else ""
        beside = f" + {known} trained ones" if known else ""
        how = f"({count(held_out, 'picture')}{twice}{beside}) × {count(levels, 'noise level')} × {tflop(work.forward)}"
        extras.append(Extra("each validation", how, pictures * levels * work.forward))
    if makes_samples(config):
        section = config.samples
        flops, passes = tracer.denoise(config).flops, 2 if section.guidance_scale != 1 else 1
        both = " × 2 (with and without the prompt)" if passes == 2 else ""
        if section.sampler == "heun":
            passes, both = 2 * passes, f"{both} × 2 (heun)"
        how = f"{count(len(section.prompts), 'picture')} × {count(section.steps, 'step')}{both} × {tflop(flops)}, in {unet_dtype(config)}"
        extras.append(Extra("each set of sample pictures", how, len(section.prompts) * section.steps * passes * flops))
    return extras


def validation_pictures(config: Config, num_pictures: int, apart: int = 0) -> int:
    """About how many pictures each validation measures: those of sources for it, held-out ones, or some of the training set."""
    section = config.validation
    if apart or section.share == 0:
        return min(apart or num_pictures, section.max_pictures)
    return expected_held_out(num_pictures, share=section.share, max_pictures=section.max_pictures)


def read_timings(path: Path) -> list[tuple[int, float]]:
    """(step, seconds) of each row; none if there is no such file yet. Raises StorageError."""
    rows: Iterable[Mapping[str, Any]] = read_rows(path) if path.exists() else ()
    return [(row["step"], float(row["seconds"])) for row in rows if isinstance(row.get("seconds"), int | float)]


def measured_speed(timings: Sequence[tuple[int, float]]) -> Speed | None:
    """The speed of the latest process that can tell: its clock started with it, so rows of two are never compared."""
    for part in reversed(split_by_process(timings)):
        (first, start), (last, end) = part[0], part[-1]
        if len(part) > 1:
            return Speed(first, last, end - start, done=timings[-1][0])
    return None


def split_by_process(timings: Sequence[tuple[int, float]]) -> list[list[tuple[int, float]]]:
    """Rows in groups in which steps and seconds both grow. Where they do not, the run was started again."""
    parts: list[list[tuple[int, float]]] = []
    for step, seconds in timings:
        if parts and step > parts[-1][-1][0] and seconds > parts[-1][-1][1]:
            parts[-1].append((step, seconds))
        else:
            parts.append([(step, seconds)])
    return parts


def work_lines(work: Work, size_hw: tuple[int, int], *, recomputes: bool) -> list[str]:
    """From a sample to the run, multiplied out."""
    height, width = size_hw
    backward = "backward pass, which computes much of it again," if recomputes else "backward pass"
    others = f"others have up to {1 - MIN_AREA_SHARE:.0%} fewer pixels"
    return [
        f"counted in the network itself, for the largest bucket ({width} × {height} pixels); {others}",
        f"a sample: forward pass {tflop(work.forward)} + {backward} {tflop(work.sample - work.forward)} = {tflop(work.sample)}",
        f"a step: {tflop(work.sample)} × {count(work.samples_per_step, 'sample')} = {tflop(work.step)}",
        f"the run: {tflop(work.step)} × {count(work.steps, 'step')} = {tflop(work.run)} (1 TFLOP is 10¹² floating-point operations)",
    ]


def card_lines(work: Work, share: float = ASSUMED_SHARE) -> list[str]:
    """The steps on a few cards."""
    row = "  {:<12}{:>16}{:>14}{:>18}".format
    return [
        f"a forecast, not a promise: divided by {share:.0%} of a card's bf16 peak, which good training reaches",
        "a small batch on a fast card stays far below that, because starting each operation takes time too",
        row("", "peak", "a step", "the run"),
        *(row(card.name, f"{card.peak} TFLOP/s", *map(time_text, seconds_on(card, work, share))) for card in CARDS),
    ]


def seconds_on(card: Card, work: Work, share: float) -> tuple[float, float]:
    """Seconds of a step and of the run, if the card does `share` of its peak."""
    rate = card.peak * TERA * share
    return work.step / rate, work.run / rate


def extra_lines(extras: Sequence[Extra], work: Work) -> list[str]:
    """What comes on top, in steps, so that it means the same on every card."""
    lines = [f"  {extra.name}: {extra.how} = {tflop(extra.flops)}, as much as {number(extra.flops / work.step)} steps" for extra in extras]
    return ["on top of the steps:", *lines, "not counted: captions, the optimizer, saving, and waiting for the disk"]


def speed_lines(speed: Speed, work: Work, folder: Path) -> list[str]:
    """What was measured, and the time that is left."""
    each, left = speed.seconds_per_step, work.steps - speed.done
    lines = [
        f"measured in {folder}, with all that is done between steps:",
        f"  steps {speed.first:,} to {speed.last:,} took {time_text(speed.seconds)}, {time_text(each)} a step",
        f"  {tflop(work.step)} ÷ {time_text(each)} = {tflop(work.step / each)} a second",
    ]
    if left <= 0:
        return [*lines, f"  all {count(work.steps, 'step')} are done"]
    return [*lines, f"  left: {work.steps:,} - {speed.done:,} = {count(left, 'step')} × {time_text(each)} = {time_text(left * each)}"]


def tflop(flops: float) -> str:
    """`25.44 TFLOP`: no more digits than can be of use."""
    value = flops / TERA
    return f"{f'{value:,.0f}' if value >= 1000 else number(value) if value >= 1 else f'{value:.3g}'} TFLOP"


def time_text(seconds: float) -> str:
    """`0.21 s`, `35 s`, `12 min`, `3 h 20 min`, `4 days 2 h`."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 100:
        return f"{f'{seconds / 60:.1f}' if minutes < 10 else minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"
