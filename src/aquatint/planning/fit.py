"""How a run is made to fit: the settings that cost least of all that fit, found by planning each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from aquatint.config.check import RULES, find
from aquatint.config.schema import Config
from aquatint.models.sdxl.model import ModelSpec
from aquatint.planning.knobs import KNOBS, Changes, Knob, Level, changes_text, fused_backward, with_changes
from aquatint.planning.memory import (
    DTYPE_BYTES,
    GIB,
    MemoryPlan,
    Tracer,
    encoding_pictures,
    gib,
    makes_samples,
    outside_bytes,
    plan_memory,
    sampling,
    step_parts,
    training,
)
from aquatint.planning.shapes import largest_bucket
from aquatint.planning.trained import num_trained, weight_dtype

ENCODING = ("encoding pictures",)
NOTABLY_LESS = 0.95
ALMOST = 0.99  # activations grow with the batch by as much for each picture, but for a trifle
ONE_PICTURE = {"training.batch_size": 1, "training.accumulation_steps": 1}
SMALLER = Level({"buckets.resolution": 768}, 100, "smaller pictures")
LORA = Level({"adapter.kind": "lora"}, 100, "a LoRA instead of the whole UNet, with a learning rate of 1e-4")


@dataclass(frozen=True)
class Help:
    """A knob turned alone, and the plan with it."""

    level: Level
    plan: MemoryPlan


@dataclass(frozen=True)
class Fit:
    """A config for a limit in bytes: what was changed, and its plan. `fits` is False if nothing does; then it is the least there is."""

    limit: int
    levels: tuple[Level, ...]
    config: Config
    plan: MemoryPlan

    @property
    def fits(self) -> bool:
        return self.plan.needed <= self.limit

    @property
    def changes(self) -> dict[str, Any]:
        return merged(self.levels)

    @property
    def turned(self) -> tuple[Level, ...]:
        """The levels without what a later one sets again."""
        kept = [{key: value for key, value in level.changes.items() if self.changes[key] == value} for level in self.levels]
        return tuple(replace(level, changes=changes) for level, changes in zip(self.levels, kept, strict=True) if changes)


def merged(levels: Sequence[Level]) -> dict[str, Any]:
    """The changes of several levels, later ones above earlier ones."""
    return {key: value for level in levels for key, value in level.changes.items()}


def helps(config: Config, spec: ModelSpec, limit: int, tracer: Tracer) -> Iterator[Help]:
    """Single settings that make the phases smaller which are too large, the cheapest first, up to the first that makes the run fit."""
    before = plan_memory(config, spec, tracer)
    large = {phase.name for phase in before.phases if phase.bytes + before.outside > limit}
    for level in by_cost(level for knob in KNOBS if large.intersection(knob.phases) for level in knob.levels(config)):
        yield from (found := _help(config, level, before, spec, tracer))
        if found and found[0].plan.needed <= limit:
            return


def mild_helps(config: Config, spec: ModelSpec, tracer: Tracer) -> Iterator[Help]:
    """The cheapest level of each knob that makes the largest phase smaller, the cheapest first."""
    before = plan_memory(config, spec, tracer)
    knobs = [knob for knob in KNOBS if before.largest.name in knob.phases]
    for level in by_cost(level for knob in knobs for level in [level for level in knob.levels(config) if level.cost][:1]):
        yield from _help(config, level, before, spec, tracer)


def by_cost(levels: Iterable[Level]) -> list[Level]:
    return sorted(levels, key=lambda level: level.cost)


def _help(config: Config, level: Level, before: MemoryPlan, spec: ModelSpec, tracer: Tracer) -> tuple[Help, ...]:
    """The level with its plan, if it is allowed and of use."""
    changed = with_changes(config, level.changes)
    plan = plan_memory(changed, spec, tracer) if is_allowed(changed) else before
    return (Help(level, plan),) if plan.needed < before.needed else ()


def advice(config: Config, spec: ModelSpec, limit: int | None) -> str:
    """What to set so that a run fits which turned out not to, into `limit` bytes if that is known, whatever the plan said before."""
    tracer = Tracer(spec)
    needed = plan_memory(config, spec, tracer).needed
    target = min(limit or needed, int(NOTABLY_LESS * needed))
    found = list(helps(config, spec, target, tracer))
    if found and found[-1].plan.needed <= target:
        level, less = found[-1].level, gib(needed - found[-1].plan.needed)
        return f"the cheapest change that is enough: {changes_text(level.changes)} ({level.price}), {less} less"
    return f"no single setting is enough: `aquatint plan` with `--fit {target / GIB:.1f}GiB` finds several together"


def is_allowed(config: Config) -> bool:
    """Whether no two settings contradict each other."""
    return next(iter(find(RULES, config)), None) is None


def choices(config: Config, knobs: Sequence[Knob]) -> list[tuple[Level, ...]]:
    """All ways to turn these knobs together, the cheapest first; of equals, the one that turns fewer."""
    ways = product(*(((), *((level,) for level in knob.levels(config))) for knob in knobs))
    joined = [tuple(level for way in choice for level in way) for choice in ways]
    return sorted(joined, key=lambda levels: (sum(level.cost for level in levels), len(levels)))


class Search:
    """Looks for the settings of a run with which it fits into `limit` bytes."""

    def __init__(self, config: Config, spec: ModelSpec, limit: int, tracer: Tracer) -> None:
        self.config, self.spec, self.limit, self.tracer = config, spec, limit, tracer
        self.size_hw = largest_bucket(config)
        self.room = limit - outside_bytes(config)
        self._fitting_steps: dict[str, bool] = {}
        self._fitting_samples: dict[str, bool] = {}

    def run(self) -> Fit:
        """The settings of least cost, or of least memory if none fit. Raises UsageError for buckets that cannot be."""
        encoding = [knob for knob in KNOBS if knob.phases == ENCODING]
        steps = [knob for knob in KNOBS if knob.phases != ENCODING]
        if self._is_hopeless():
            return self._least(encoding, steps)
        first = next(filter(self._encodes, choices(self.config, encoding)), None)
        second = next(filter(self._trains, choices(self.config, steps)), None)
        if first is None or second is None:
            return self._least(encoding, steps)
        return self._fit(first + second)

    def _is_hopeless(self) -> bool:
        """Whether a phase is too large that no knob makes smaller."""
        known = {name for knob in KNOBS for name in knob.phases}
        phases = plan_memory(self.config, self.spec, self.tracer).phases
        return any(phase.bytes > self.room for phase in phases if phase.name not in known)

    def _fit(self, levels: tuple[Level, ...]) -> Fit:
        changed = with_changes(self.config, merged(levels))
        return Fit(self.limit, levels, changed, plan_memory(changed, self.spec, self.tracer))

    def _encodes(self, levels: tuple[Level, ...]) -> bool:
        changed = with_changes(self.config, merged(levels))
        return encoding_pictures(changed, self.spec, self.tracer, self.size_hw).bytes <= self.room

    def _trains(self, levels: tuple[Level, ...]) -> bool:
        changes = merged(levels)
        if not self._steps({key: value for key, value in changes.items() if not key.startswith("samples.")}):
            return False
        changed = with_changes(self.config, changes)
        if not (is_allowed(changed) and self._samples(changed)):
            return False
        phases = plan_memory(changed, self.spec, self.tracer).phases
        return all(phase.bytes <= self.room for phase in phases if phase.name not in ENCODING)

    def _steps(self, changes: Changes) -> bool:
        """Whether these changes are allowed and the steps fit. A bound that is sooner known comes before the full trace."""
        key = repr(sorted(changes.items()))
        if key not in self._fitting_steps:
            config = with_changes(self.config, changes)
            fits = is_allowed(config) and self._least_bytes(config) <= self.room
            self._fitting_steps[key] = fits and training(config, self.spec, self.tracer, self.size_hw).bytes <= self.room
        return self._fitting_steps[key]

    def _least_bytes(self, config: Config) -> int:
        """What the steps take at least: what stays, all gradients if they wait, and as much more as batches of 1 and 2 tell."""
        section = config.training
        waiting = not section.fused_backward or section.accumulation_steps > 1
        gradients = num_trained(config, self.spec) * DTYPE_BYTES[weight_dtype(config)] * waiting
        stays = sum(part.bytes for part in step_parts(config, self.spec))
        if stays + gradients > self.room or section.at_once == 1:
            return stays + gradients
        one, two = (self.tracer.step(with_changes(config, {"training.batch_size": size}), self.size_hw) for size in (1, 2))
        activations = one.activations + (section.at_once - 1) * (two.activations - one.activations)
        return stays + max(one.peak, int(ALMOST * activations))

    def _samples(self, config: Config) -> bool:
        if not makes_samples(config):
            return True
        key = repr((config.samples, config.optimizer, config.ema, config.training.precision, config.text_encoders))
        if key not in self._fitting_samples:
            stays = sum(part.bytes for part in step_parts(config, self.spec))
            self._fitting_samples[key] = stays <= self.room and sampling(config, self.spec, self.tracer).bytes <= self.room
        return self._fitting_samples[key]

    def _least(self, encoding: Sequence[Knob], steps: Sequence[Knob]) -> Fit:
        """Everything turned as far as it goes; of batches and steps inside the backward pass, the ways that need least together."""
        free = {"step inside the backward pass", "batch and accumulation"}
        last = tuple(knob.levels(self.config)[-1:] for knob in (*encoding, *steps) if knob.name not in free)
        ways = choices(self.config, [knob for knob in steps if knob.name in free])
        extremes = [way for way in ways if self._is_extreme(merged(way))]
        return min(
            (self._fit((*(level for levels in last for level in levels), *way)) for way in extremes), key=lambda fit: fit.plan.needed
        )

    def _is_extreme(self, changes: Changes) -> bool:
        """Whether all pictures of a step go through at once, or one at a time: between them there is nothing to gain."""
        section = with_changes(self.config, changes).training
        return section.accumulation_steps == 1 or section.at_once == 1


def beyond(found: Fit, spec: ModelSpec, tracer: Tracer) -> Iterator[Help]:
    """For a run that fits in no way: changes of what is trained with which it would, on top of all others."""
    freed = merged(fused_backward(found.config))
    for level in (Level({**ONE_PICTURE, **freed}, 100, "one picture per step, with a lower learning rate"), SMALLER, LORA):
        changed = with_changes(found.config, level.changes)
        if changed != found.config and is_allowed(changed):
            plan = plan_memory(changed, spec, tracer)
            if plan.needed <= found.limit:
                yield Help(level, plan)


def fit(config: Config, spec: ModelSpec, limit: int, tracer: Tracer | None = None) -> Fit:
    """The settings of least cost with which a run fits into `limit` bytes, or if there are none, those of least memory."""
    tracer = tracer or Tracer(spec)
    before = plan_memory(config, spec, tracer)
    return Fit(limit, (), config, before) if before.needed <= limit else Search(config, spec, limit, tracer).run()
