"""Every setting by its dotted key, in words: one table read off the JSON Schema, so help, hints and templates agree."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from aquatint.config.schema import json_schema

ANY_INDEX = "*"  # stands for the number in `data.sources.0.path`
OPTIMIZER = "optimizer"

_ALIKE, _VERY_ALIKE, _MUCH_LESS = 0.66, 0.9, 0.15  # likeness of two keys is at most 1.25
_OTHER_RUN = "vae_training"  # its settings are named like the main run's, which are meant far more often

OTHER_NAMES = {
    "batch": "training.batch_size", "caption_dropout_rate": "captions.dropout_prob", "caption_ext": "data.sources.*.caption_extensions",
    "caption_tag_dropout_rate": "captions.tag_drop_prob", "concepts": "data.sources", "dataset": "data.sources",
    "ema_decay": "ema.decay", "epochs": "training.length", "flip_aug": "crop.flip_prob",
    "gradient_accumulation_steps": "training.accumulation_steps", "image_dir": "data.sources.*.path",
    "debiased_estimation_loss": "diffusion.weighting", "ip_noise_gamma": "noise.input_perturbation",
    "keep_tokens": "captions.keep_first", "logging_dir": "run.folder",
    "loss_type": "diffusion.loss", "lr": "optimizer.learning_rate", "lr_scheduler": "lr.schedule",
    "max_timestep": "timesteps.highest", "min_timestep": "timesteps.lowest", "multires_noise_discount": "noise.pyramid",
    "noise_offset": "noise.offset", "timestep_sampling": "timesteps.density", "weighting_scheme": "timesteps.density",
    "lr_warmup_steps": "lr.warmup", "max_data_loader_n_workers": "loader.workers", "max_grad_norm": "training.clip_norm",
    "max_train_epochs": "training.length", "max_train_steps": "training.length", "min_snr_gamma": "diffusion.gamma",
    "mixed_precision": "training.precision", "num_epochs": "training.length", "num_repeats": "data.sources.*.repeats",
    "num_workers": "loader.workers", "optimizer_type": "optimizer.name", "output_dir": "run.folder", "output_name": "run.name",
    "pretrained_model_name_or_path": "model.base", "prediction_type": "model.prediction", "random_crop": "crop.mode",
    "sample_every_n_steps": "samples.every", "sample_prompts": "samples.prompts", "save_every_n_steps": "checkpoints.every",
    "save_precision": "export.dtype", "save_steps": "checkpoints.every", "shuffle_caption": "captions.shuffle",
    "steps": "training.length", "train_batch_size": "training.batch_size", "train_data_dir": "data.sources.*.path",
    "v_parameterization": "model.prediction", "v_pred": "model.prediction", "zero_snr": "model.zero_terminal_snr",
    "ztsnr": "model.zero_terminal_snr",
}  # fmt: skip
"""What other trainers call a setting. Only hints are made of it."""


@dataclass(frozen=True)
class Setting:
    """One setting. `schema` is its part of the JSON Schema; `default` is None also if it has none and is `required`."""

    key: str
    doc: str
    kind: str
    default: Any
    required: bool
    schema: Mapping[str, Any]

    @property
    def is_text(self) -> bool:
        """Whether every value is text, so that the command line need not be read as numbers."""
        return all(branch.get("type") in ("string", "null") for branch in _branches(self.schema))

    @property
    def is_path(self) -> bool:
        return any(branch.get("format") == "path" for branch in _branches(self.schema))

    @property
    def choices(self) -> list[str]:
        branches = _branches(self.schema)
        return [value for branch in branches for value in branch.get("enum", [branch["const"]] if "const" in branch else [])]


@dataclass(frozen=True)
class Table:
    """All settings and sections for one choice of optimizer, by dotted key, in the order of the schema."""

    settings: Mapping[str, Setting]
    sections: Mapping[str, str]  # key -> help

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.settings, *self.sections)


@cache
def _schema() -> dict[str, Any]:
    return json_schema()


@cache
def optimizer_names() -> tuple[str, ...]:
    return tuple(_resolve(variant)["properties"]["name"]["const"] for variant in _schema()["properties"][OPTIMIZER]["oneOf"])


@cache
def table(optimizer: str = "adamw") -> Table:
    """The settings of a config that uses this optimizer."""
    settings: dict[str, Setting] = {}
    sections: dict[str, str] = {}
    for key, node, required in _walk(_schema(), "", optimizer):
        if _is_section(node):
            sections[key] = node.get("description", "")
        else:
            settings[key] = Setting(key, node.get("description", ""), kind_of(node), node.get("default"), required, _without_null(node))
    return Table(settings, sections)


@cache
def all_keys() -> tuple[str, ...]:
    """Every key that any optimizer has."""
    return tuple(dict.fromkeys(key for name in optimizer_names() for key in table(name).keys))


def optimizers_with(key: str) -> tuple[str, ...]:
    return tuple(name for name in optimizer_names() if key in table(name).settings)


def _resolve(node: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in node:
        return node
    target = _schema()["$defs"][node["$ref"].rpartition("/")[2]]
    return {**target, **{name: value for name, value in node.items() if name != "$ref"}}


def _walk(node: Mapping[str, Any], prefix: str, optimizer: str) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    for name, child in node["properties"].items():
        child = _resolve(child)
        if "oneOf" in child:
            child = _one_variant(child, optimizer)
        key = f"{prefix}{name}"
        items = _resolve(child.get("items", {})) if child.get("type") == "array" else {}
        yield key, child, name in node.get("required", [])
        if "properties" in items:
            yield from _walk(items, f"{key}.{ANY_INDEX}.", optimizer)
        elif "properties" in child:
            yield from _walk(child, f"{key}.", optimizer)


def _one_variant(union: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    variants = {_resolve(variant)["properties"]["name"]["const"]: _resolve(variant)["properties"] for variant in union["oneOf"]}
    docs = "\n".join(f"{other}: {properties['name']['description']}" for other, properties in variants.items())
    names = {"enum": list(variants), "type": "string", "default": "adamw", "description": docs}
    return {"properties": {**variants[name], "name": names}, "description": union["description"]}


def _is_section(node: Mapping[str, Any]) -> bool:
    return "properties" in node or "properties" in _resolve(node.get("items") or {})


def _without_null(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """A setting that may also be left open, as if it had to be something."""
    branches = [branch for branch in _branches(node) if branch.get("type") != "null"]
    return node if "expected" in node or len(branches) != 1 else {**node, **branches[0]}


def _branches(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(node.get("anyOf", [node]))


def kind_of(node: Mapping[str, Any]) -> str:
    """What may be written, in words: `a whole number, at least 1`."""
    if "expected" in node:
        return str(node["expected"])
    if "anyOf" in node:
        return " or ".join(kind_of(branch) for branch in node["anyOf"] if branch.get("type") != "null")
    if "enum" in node or "const" in node:
        names = [f'"{value}"' for value in node.get("enum", [node.get("const")])]
        return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    if node["type"] == "array":
        return _kind_of_list(node)
    words = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
    return "a path" if node.get("format") == "path" else words[node["type"]] + _limits(node)


def _kind_of_list(node: Mapping[str, Any]) -> str:
    if "prefixItems" in node:
        return f"a list of {len(node['prefixItems'])} values, each {kind_of(node['prefixItems'][0])}"
    if node.get("items", {}).get("type") == "integer":
        return "a list of whole numbers, such as [768, 512]"
    return 'a list of texts, such as ["…", "…"]'


def _limits(node: Mapping[str, Any]) -> str:
    low, high = node.get("minimum"), node.get("maximum")
    parts = [f", a multiple of {node['multipleOf']}"] if "multipleOf" in node else []
    if low is not None and high is not None:
        parts.append(f" from {low:g} to {high:g}")
    elif low is not None:
        parts.append(f", at least {low:g}")
    if "exclusiveMinimum" in node:
        parts.append(f", more than {node['exclusiveMinimum']:g}")
        parts += [f" and at most {high:g}"] if high is not None else []
    if node.get("exclusiveMaximum", 2**63) < 2**63:
        parts.append(f"{' and' if low is not None else ','} less than {node['exclusiveMaximum']:g}")
    return "".join(parts)


def generic(key: str) -> str:
    """`data.sources.0.path` -> `data.sources.*.path`."""
    return ".".join(ANY_INDEX if part.isdecimal() else part for part in key.split("."))


def suggest(key: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The settings that somebody who wrote `key` may have meant, likeliest first; empty if nothing is near.

    A close spelling in the same section comes first, then what other trainers mean by that name, then a setting of just
    that name in another section, then whatever is spelt alike.
    """
    known = tuple(known)
    key = generic(key).lower().replace("-", "_")
    section, _, leaf = key.rpartition(".")
    scores = _likeness(section, leaf, key, known)
    best = max(scores.values())
    ranked = sorted(known, key=lambda other: (-scores[other], other))
    near = [other for other in ranked if scores[other] >= max(_ALIKE, best - _MUCH_LESS)]
    surely = [other for other in near[:1] if other.rpartition(".")[0] == section and scores[other] >= _VERY_ALIKE]
    inside = [section] if optimizers_with(section) else []  # not a section but a setting, which holds nothing
    renamed = [OTHER_NAMES[leaf]] if OTHER_NAMES.get(leaf) in known else []
    moved = [other for other in ranked if other.rpartition(".")[2] == leaf and other != key]
    return list(dict.fromkeys(near if surely else inside + renamed + moved or near))[:limit]


def _likeness(section: str, leaf: str, key: str, known: Iterable[str]) -> dict[str, float]:
    """How alike each known key is: as a whole, in its last name, a bonus for the same section, a malus for another run's."""
    whole, last = difflib.SequenceMatcher(b=key, autojunk=False), difflib.SequenceMatcher(b=leaf, autojunk=False)
    scores = {}
    for other in known:
        other_section, _, other_leaf = other.rpartition(".")
        whole.set_seq1(other)
        last.set_seq1(other_leaf)
        of_another_run = other_section == _OTHER_RUN and not section.startswith("vae")
        scores[other] = (whole.ratio() + last.ratio()) / 2 + (0.25 if section == other_section else -0.25 if of_another_run else 0.0)
    return scores
