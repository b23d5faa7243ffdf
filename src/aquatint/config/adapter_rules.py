"""Settings of adapters that do not go together, or do little."""

from __future__ import annotations

from collections.abc import Callable

from aquatint.config.rule import Rule
from aquatint.config.schema import Config
from aquatint.config.sections.library_optimizers import OWN_RATE
from aquatint.config.sections.looks import ExportSection
from aquatint.config.sections.methods import AdapterSection

HIGH_LEARNING_RATE, LOW_LEARNING_RATE = 2e-3, 2e-5  # 1e-4 to 5e-4 is usual for LoRA with AdamW


def has_adapter(config: Config) -> bool:
    """Whether an adapter is trained, and the UNet is frozen."""
    return config.adapter.kind != "none"


def _is_set_without_adapter(name: str) -> Callable[[Config], bool]:
    return lambda config: not has_adapter(config) and getattr(config.adapter, name) != getattr(AdapterSection(), name)


def _is_export_without_adapter(name: str) -> Callable[[Config], bool]:
    return lambda config: not has_adapter(config) and getattr(config.export, name) != getattr(ExportSection(), name)


ADAPTER_RULES = (
    *(
        Rule(
            (f"adapter.{name}", "adapter.kind"),
            _is_set_without_adapter(name),
            f'`adapter.{name}` does nothing with `adapter.kind = "none"`',
            f'the whole UNet is trained: set `adapter.kind = "lora"`, or leave out `adapter.{name}`',
        )
        for name in ("rank", "alpha", "rslora", "targets", "start_from")
    ),
    *(
        Rule(
            (f"export.{name}", "adapter.kind"),
            _is_export_without_adapter(name),
            f'`export.{name}` does nothing with `adapter.kind = "none"`',
            f'the whole UNet is trained and exported: set `adapter.kind = "lora"`, or leave out `export.{name}`',
        )
        for name in ("lora_names", "merged")
    ),
    Rule(
        ("export.diffusers_folder", "export.merged", "adapter.kind"),
        lambda c: has_adapter(c) and c.export.diffusers_folder and not c.export.merged,
        "`export.diffusers_folder` does nothing with an adapter and without `export.merged`",
        "an adapter is exported as a file of its own: set `export.merged = true` for the whole model too, or leave it out",
    ),
    Rule(
        ("export.merged", "export.single_file", "export.diffusers_folder"),
        lambda c: c.export.merged and not c.export.single_file and not c.export.diffusers_folder,
        "`export.merged` has nothing to write",
        "it writes what `export.single_file` and `export.diffusers_folder` ask for, and both are false: set one of them, or leave it out",
    ),
    Rule(
        ("model.standardise_latents", "adapter.kind"),
        lambda c: has_adapter(c) and c.model.standardise_latents,
        "`model.standardise_latents` cannot go with an adapter",
        "it comes with an autoencoder of its own, which a LoRA file cannot carry: leave it out",
    ),
)
"""Contradictions: a config with one of them is refused."""

ADAPTER_REMARKS = (
    Rule(
        ("optimizer.learning_rate", "adapter.kind"),
        lambda c: has_adapter(c) and c.optimizer.learning_rate > HIGH_LEARNING_RATE and c.optimizer.name not in OWN_RATE,
        "`optimizer.learning_rate = {c.optimizer.learning_rate:g}` is far above what adapters stand",
        "1e-4 to 5e-4 is usual",
    ),
    Rule(
        ("optimizer.learning_rate", "adapter.kind"),
        lambda c: has_adapter(c) and 0 < c.optimizer.learning_rate < LOW_LEARNING_RATE and c.optimizer.name not in OWN_RATE,
        "`optimizer.learning_rate = {c.optimizer.learning_rate:g}` is for a whole UNet: an adapter hardly learns with it",
        "1e-4 to 5e-4 is usual",
    ),
    Rule(
        ("model.retarget", "adapter.kind", "export.merged"),
        lambda c: has_adapter(c) and c.model.retarget and not c.export.merged,
        "an adapter with `model.retarget` is for another prediction than its base, which programs take from the base",
        "whoever uses it has to set that up by hand, or `export.merged = true` writes a model that says it itself",
    ),
)
"""Worth a look, but allowed."""
