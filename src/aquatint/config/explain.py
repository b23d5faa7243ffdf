"""Settings explained, and their defaults as a file: both read off the schema."""

from __future__ import annotations

import json
from typing import Any

from aquatint.config.describe import ANY_INDEX, Setting, all_keys, generic, optimizers_with, suggest, table
from aquatint.config.schema import Config, dump
from aquatint.config.words import find_setting, shown, suggestion_hint
from aquatint.errors import UsageError

_REQUIRED: dict[str, Any] = {"model": {"base": "…"}, "data": {"sources": [{"path": "…"}]}}


def explanation(key: str) -> str:
    """What a setting or section does; an overview of all for an empty key. Raises UsageError with the nearest names."""
    wanted = generic(key)
    if not key:
        return "\n\n".join(f"[{section}] {doc}\n{_overview(section)}".rstrip() for section, doc in table().sections.items())
    if wanted in table().sections:
        return f"[{key}] {table().sections[wanted]}\n{_overview(wanted)}"
    if wanted not in all_keys() or (setting := find_setting(wanted)) is None:
        raise UsageError(f"there is no setting `{key}`", hint=suggestion_hint(suggest(key, all_keys())))
    return _explain(setting)


def _explain(setting: Setting) -> str:
    rows = [setting.key, setting.doc, f"write    {setting.kind}"]
    owners = optimizers_with(setting.key)
    defaults = {owner: _default(table(owner).settings[setting.key]) for owner in owners}
    if len(set(defaults.values())) == 1:
        rows.append(f"default  {defaults[owners[0]]}")
    else:
        rows += [f"default  {default} with {owner}" for owner, default in defaults.items()]
    if len(owners) < len(optimizers_with("optimizer.name")):
        rows.append(f"only with optimizer.name = {' or '.join(shown(owner) for owner in owners)}")
    return "\n".join(rows)


def _default(setting: Setting) -> str:
    if setting.required:
        return "none: it must be set"
    return "not set" if setting.default is None else shown(setting.default)


def _overview(section: str) -> str:
    """One line per setting of a section, for any optimizer."""
    keys = [key for key in all_keys() if key.rpartition(".")[0] in (section, f"{section}.{ANY_INDEX}") and key not in table().sections]
    settings = [setting for key in keys if (setting := find_setting(key))]
    return "\n".join(f"  {setting.key.replace(f'.{ANY_INDEX}', '.0'):<36} {_default(setting)}" for setting in settings)


def defaults_json() -> str:
    """Every default as JSON, without the settings that must be set: adding those makes it a config."""
    values = dump(Config.model_validate(_REQUIRED))
    for section in _REQUIRED:
        del values[section]["base" if section == "model" else "sources"]
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
