"""Whether a run fits, and what makes it fit, as text and as a config file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from aquatint.config.describe import OPTIMIZER, table
from aquatint.config.schema import Config
from aquatint.config.sections.fields import NEVER
from aquatint.config.template import Preset, flatten, render
from aquatint.config.words import find_setting
from aquatint.errors import UsageError
from aquatint.models.sdxl.model import ModelSpec
from aquatint.planning.batch import is_open, largest_batch_size, with_batch_size
from aquatint.planning.fit import Fit, beyond, fit, helps
from aquatint.planning.knobs import changes_text, value_text
from aquatint.planning.memory import GIB, MemoryPlan, Tracer, gib, plan_memory

UNITS = {"": GIB, "gib": GIB, "gb": GIB, "mib": 1 << 20, "mb": 1 << 20}  # a card sold with 12 GB has 12 GiB


def parse_size(text: str) -> int:
    """Bytes: `12GiB`, `12GB`, `12`, `800 MiB`. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None or float(found[1]) == 0:
        raise UsageError(f"`{text}` is not a size of memory", hint="write it as 12GiB, 12GB or 12, or in MiB; a card's GB are GiB")
    return int(float(found[1]) * unit)


def vram_text(config: Config, spec: ModelSpec, limit: int, tracer: Tracer | None = None) -> str:
    """Whether each phase fits into `limit` bytes, and the cheapest setting that makes all of them fit. Raises UsageError."""
    tracer, found = tracer or Tracer(spec), []
    if is_open(config):
        config = with_batch_size(config, largest_batch_size(config, spec, limit, tracer))
        section = config.training
        found = [f'  `training.batch_size = "auto"` would be {section.batch_size}, {section.accumulation_steps} times a step']
    plan = plan_memory(config, spec, tracer)
    lines = [f"{_whose(plan)} of `{config.run.name}`, of {gib(limit)}", *found, *(f"  {line}" for line in phase_lines(plan, limit))]
    if plan.needed <= limit:
        return "\n".join(lines) + "\n"
    return "\n".join([*lines, "", "to make it fit, the cheapest first:", *_help_lines(config, spec, limit, tracer)]) + "\n"


def _whose(plan: MemoryPlan) -> str:
    return "GPU memory" if plan.on_gpu else "Main memory"


def phase_lines(plan: MemoryPlan, limit: int) -> Iterator[str]:
    """A line for each phase: what it needs, and what is left or missing."""
    for phase in plan.phases:
        left = limit - phase.bytes - plan.outside
        verdict = f"fits, {gib(left)} to spare" if left >= 0 else f"{gib(-left)} too much"
        yield f"{phase.name:<24}{gib(phase.bytes + plan.outside):>11}   {verdict}"
    what = "the driver and what the allocator cannot use" if plan.on_gpu else "the program itself"
    yield f"each with about {gib(plan.outside)} for {what}"


def _help_lines(config: Config, spec: ModelSpec, limit: int, tracer: Tracer) -> Iterator[str]:
    """Each setting with what it saves, up to the first that is enough alone."""
    before, fits = plan_memory(config, spec, tracer).needed, False
    for found in helps(config, spec, limit, tracer):
        fits = found.plan.needed <= limit
        enough = "enough" if fits else "not enough alone"
        yield f"  saves {gib(before - found.plan.needed)}   {changes_text(found.level.changes)} ({found.level.price}): {enough}"
    if not fits:
        yield f"  no single setting is enough: `--fit {limit / GIB:g}GiB` looks for several together"


def fit_text(found: Fit, original: Config, spec: ModelSpec, tracer: Tracer) -> str:
    """The settings that make a run fit, each with its price. Raises UsageError if nothing does."""
    if not found.fits:
        raise UsageError(
            f"`{original.run.name}` does not fit into {gib(found.limit)}: {least_text(found)}", hint=_way_out(found, spec, tracer)
        )
    if not found.levels:
        return f"`{original.run.name}` fits into {gib(found.limit)} as it is: it needs {gib(found.plan.needed)}\n"
    before, left = plan_memory(original, spec, tracer).needed, found.limit - found.plan.needed
    lines = [
        f"`{original.run.name}` needs {gib(before)}; with these settings {gib(found.plan.needed)}, {gib(left)} to spare",
        "",
        *(f"  {changes_text(level.changes)}   ({level.price})" for level in found.turned),
        *(f"  take out of the file: {key}" for key in lost_settings(original, found)),
        "",
        *(f"  {line}" for line in phase_lines(found.plan, found.limit)),
        "",
        f"all in one line: {changes_text(found.changes)}",
    ]
    return "\n".join(lines) + "\n"


def least_text(found: Fit) -> str:
    """What is needed at least, and how."""
    return f"the least is {gib(found.plan.needed)}, with {changes_text(found.changes) or 'nothing left to change'}"


def _way_out(found: Fit, spec: ModelSpec, tracer: Tracer) -> str:
    ways = [f"{changes_text(way.level.changes)} ({way.level.price}): {gib(way.plan.needed)}" for way in beyond(found, spec, tracer)]
    if not ways:
        return "that is more than this memory holds, whatever is changed: use a larger one"
    return f"on top of that it would fit with {'; or '.join(ways)}"


def lost_settings(original: Config, found: Fit) -> list[str]:
    """Settings of the file that another optimizer does not have."""
    known = table(found.config.optimizer.name).settings
    keys = (f"{OPTIMIZER}.{name}" for name in original.optimizer.model_fields_set)
    return sorted(key for key in keys if key not in known)


def fitted_config(found: Fit, original: Config) -> str:
    """The config with the changes, as a complete commented file."""
    values = _written_values(original)
    if found.config.optimizer.name != original.optimizer.name:
        values = {key: value for key, value in values.items() if not key.startswith(f"{OPTIMIZER}.") or key == f"{OPTIMIZER}.learning_rate"}
    values |= {key: NEVER if value is None else value for key, value in found.changes.items()}
    reasons = {key: level.price for level in found.turned for key in level.changes}
    header = f"`{original.run.name}` for {gib(found.limit)} of memory: the plan says {gib(found.plan.needed)}."
    changed = "\n".join(f"{key} = {value_text(value)}" for key, value in found.changes.items())
    header = f"{header} Changed by `aquatint plan --fit`:\n{changed}" if changed else header
    return render(Preset(original.run.name, round(found.limit / GIB), header, values, reasons), {})


def _written_values(config: Config) -> dict[str, Any]:
    """What the config sets itself, by dotted key. TOML has no null: `never`, or left out."""
    plain: Mapping[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    values = {}
    for key, value in flatten(plain):
        setting = find_setting(key)
        if value is None and setting is not None and NEVER in str(setting.schema):
            values[key] = NEVER
        elif value is not None:
            values[key] = value
    return values


def plan_to_fit(config: Config, spec: ModelSpec, limit: int) -> tuple[str, str]:
    """What to change so that a run fits, as a text and as a config file. Raises UsageError if nothing fits."""
    tracer = Tracer(spec)
    config = with_batch_size(config, config.training.per_step) if is_open(config) else config
    found = fit(config, spec, limit, tracer)
    return fit_text(found, config, spec, tracer), fitted_config(found, config)
