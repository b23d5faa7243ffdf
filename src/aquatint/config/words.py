"""What is said about a setting that is missing, misspelt or wrong."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

from aquatint.config.describe import ANY_INDEX, Setting, all_keys, generic, optimizers_with, table

_MAX_SHOWN = 60  # characters of a wrong value
_EXAMPLES = {
    "model.base": 'add `base = "sd_xl_base_1.0.safetensors"` under `[model]`',
    "data.sources": 'add a `[[data.sources]]` line, and below it `path = "pictures"`',
    "data.sources.*.path": 'add `path = "pictures"` under `[[data.sources]]`',
    "captions.categories.*.tags": 'add `tags = ["artist:*"]` under `[[captions.categories]]`',
    "captions.categories.*.drop_prob": "add `drop_prob = 0.5` under `[[captions.categories]]`",
    "training.groups.*.match": 'add `match = ["down_blocks.0"]` under `[[training.groups]]`',
}
_OTHER_VALUES = {  # what other trainers call a choice
    "gpu": "cuda", "v": "v_prediction", "vpred": "v_prediction", "v_pred": "v_prediction", "eps": "epsilon", "noise": "epsilon",
    "bf16": "bf16_mixed", "full_bf16": "bf16_pure", "no": "fp32", "fp16": "float16", "half": "float16", "danbooru": "tags",
    "adam": "adamw", "min_snr_gamma": "min_snr",
}  # fmt: skip
_FIRST_IN_SECTION = {"model": "model.base", "data": "data.sources"}


def find_setting(key: str, optimizer: str | None = None) -> Setting | None:
    """The setting of a dotted key, if several optimizers have one, that of `optimizer`; of an entry of a list of plain values, the list."""
    key = generic(key)
    for name in (key, key.removesuffix(f".{ANY_INDEX}")):
        owners = optimizers_with(name)
        if owners:
            return table(optimizer if optimizer in owners else owners[0]).settings[name]
    return None


def nearest(text: str, choices: Iterable[str]) -> str | None:
    """The choice that was probably meant."""
    choices = list(choices)
    if _OTHER_VALUES.get(text.lower()) in choices:
        return _OTHER_VALUES[text.lower()]
    found = difflib.get_close_matches(text.lower(), choices, n=1, cutoff=0.5)
    return found[0] if found else None


def shown(value: Any) -> str:
    """A value as the user wrote it, or nearly, cut if long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def suggestion_hint(suggestions: list[str], section: str | None = None) -> str:
    """What to do about an unknown key: `did you mean …?` with the default, or where to look.

    `section` is where the key stands in a file, if it does.
    """
    if not suggestions:
        known = f" {section}" if section and generic(section) in all_keys() else ""
        return f"`aquatint config explain{known}` lists the settings that there are"
    names = [f"`{key.replace(f'.{ANY_INDEX}', '.0')}`" for key in suggestions]
    setting = find_setting(suggestions[0])
    default = f" (default {shown(setting.default)})" if setting and setting.default not in (None, [], ()) else ""
    home = suggestions[0].rpartition(".")[0]
    moved = f" It stands under `[{home}]`." if section is not None and home not in ("", generic(section)) and ANY_INDEX not in home else ""
    return f"did you mean {' or '.join(names)}?{default if len(names) == 1 else ''}{moved}"


def missing_value(key: str) -> tuple[str, str]:
    """Message and hint for a required setting that is not there."""
    key = _FIRST_IN_SECTION.get(key, key)
    setting = find_setting(key)
    doc = setting.doc if setting else table().sections.get(generic(key), "")
    return f"missing setting `{key}`", f"{_EXAMPLES[generic(key)]} ({_uncapitalised(doc)})"


def wrong_value(key: str, value: Any, optimizer: str | None = None) -> tuple[str, str]:
    """Message and hint for a value that a setting or section cannot have, in a config with this optimizer."""
    message = f"wrong value {shown(value)} for `{key}`"
    if generic(key) in ("data.sources", f"data.sources.{ANY_INDEX}"):
        return message, 'give each a `[[data.sources]]` line of its own (two brackets), and below it `path = "pictures"`'
    if generic(key) in ("captions.categories", f"captions.categories.{ANY_INDEX}"):
        return message, "give each group of tags a `[[captions.categories]]` line (two brackets), and below it `tags` and `drop_prob`"
    if generic(key) in ("training.groups", f"training.groups.{ANY_INDEX}"):
        return message, "give each group a `[[training.groups]]` line (two brackets), and below it `match` and `learning_rate_factor`"
    setting = find_setting(key, optimizer)
    if setting is None:
        inside = next((other for other in all_keys() if other.startswith(f"{generic(key)}.")), key)
        return message, f"`{key}` is a section that holds settings, such as `{inside}`"
    if "duration" in setting.kind and (number := _bare_number(value)):
        return message, f'a duration needs a unit: write "{number} steps" or "{number} epochs"'
    default = f" (default {shown(setting.default)})" if setting.default not in (None, [], ()) else ""
    return message, f"write {setting.kind}{_example(setting, value)}{default}"


def _bare_number(value: Any) -> str | None:
    text = str(value).strip()
    return text if text.replace(".", "", 1).isdecimal() and not isinstance(value, bool) else None


def _example(setting: Setting, value: Any) -> str:
    """The value that was probably meant."""
    if isinstance(value, str) and (choice := nearest(value, setting.choices)):
        return f'; did you mean "{choice}"?'
    if isinstance(value, int) and "multipleOf" in setting.schema and value > setting.schema["minimum"]:
        step = setting.schema["multipleOf"]
        return f", such as {value // step * step} or {-(-value // step) * step}"
    kinds = {branch.get("type") for branch in setting.schema.get("anyOf", [setting.schema])}
    if isinstance(value, str) and kinds & {"integer", "number", "boolean"}:
        bare = value.strip().lower()
        return f", without quotes: {bare}" if bare in ("true", "false") or _bare_number(bare) else ""
    return ""


def _uncapitalised(text: str) -> str:
    return (text[:1].lower() + text[1:]).rstrip(".")
