"""`aquatint cache`: build, check, count and clear what is encoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from aquatint.config.schema import Config
from aquatint.data import upkeep
from aquatint.data.manifest import Manifest
from aquatint.data.samples import Keys
from aquatint.errors import UsageError
from aquatint.models.sdxl.load import open_base
from aquatint.storage import check_writable, shared_lock
from aquatint.training.find import find_pictures, opener_of, read_quarantine
from aquatint.training.focus_points import focus_points
from aquatint.training.layout import Layout, column, lay_out, recipes_of
from aquatint.training.prepare import Prepared, Stores, prepare
from aquatint.utils.progress import say, track


def cache_run(config: Config) -> Prepared:
    """Encodes whatever is missing in the cache, and trains nothing."""
    check_writable(config.cache.folder)
    with shared_lock(config.cache.folder):
        return prepare(config, open_base(config.model.base, config.model.vae), say=say)


def build_run(config: Config) -> str:
    """The same, and tells what is there afterwards."""
    data = cache_run(config)
    return f"{len(data.manifest):,} pictures are ready for training\n{_counts(data.stores)}"


def verify_run(config: Config) -> str:
    """Reads every entry again, and removes what is damaged; looks at every picture's bytes again, whatever its file's dates say."""
    stores, lines = Stores.of(config.cache.folder), []
    with shared_lock(config.cache.folder):
        for name, store in stores.all().items():
            with track(f"reading {name}", len(store)) as on_progress:
                report = upkeep.verify(store, on_progress)
            lines.append(f"{name:<12}{report.entries:,} entries in {report.shards:,} files, {report.entries_lost:,} damaged")
            lines += [f"{'':<12}removed {shard}: {reason}" for shard, reason in report.removed.items()]
        before = find_pictures(config, opener_of(config), read_quarantine(config.cache.folder))
        after = find_pictures(config, opener_of(config), read_quarantine(config.cache.folder), rehash=True)
    known = dict(zip(names_of(before), map(bytes, before.digests), strict=True))
    changed = [name for name, digest in zip(names_of(after), map(bytes, after.digests), strict=True) if known.get(name, digest) != digest]
    lines.append(f"{'pictures':<12}{len(after):,} read again, {len(changed):,} changed without a trace in their file's dates")
    return "\n".join([*lines, *(f"{'':<12}{name}" for name in changed)])


def stat_run(config: Config) -> str:
    """What is in the cache, and how much of it this config uses."""
    stores = Stores.of(config.cache.folder)
    lines = [_counts(stores)]
    wanted = _wanted(config)
    for name, store in stores.all().items():
        used = int(store.has(wanted[name]).sum())
        lines.append(f"{name:<12}{used:,} of {len(wanted[name]):,} entries that this config uses are there")
    return "\n".join(lines)


def gc_run(configs: Sequence[Config], *, remove: bool) -> str:
    """Removes what none of the configs uses, or tells what that would be. Raises UsageError for configs of several caches."""
    folders = {config.cache.folder for config in configs}
    if len(folders) != 1:
        raise UsageError(
            f"these configs use {len(folders)} different caches", hint="clear one cache at a time, with all configs that use it"
        )
    per_config = [_wanted(config) for config in configs]
    lines = []
    for name, store in Stores.of(folders.pop()).all().items():
        wanted = np.unique(np.concatenate([one[name] for one in per_config]), axis=0)
        report = upkeep.gc(store, wanted, dry_run=not remove)
        verb = "removed" if remove else "would be removed"
        lines.append(f"{name:<12}{report.entries_lost:,} of {report.entries:,} entries {verb}, {report.freed_bytes / (1 << 20):,.1f} MiB")
    return "\n".join([*lines, *([] if remove else ["nothing was removed; `--remove` does it"])])


def _counts(stores: Stores) -> str:
    return "\n".join(_count(name, store_stat) for name, store_stat in _stats(stores))


def _stats(stores: Stores) -> Iterator[tuple[str, upkeep.Stat]]:
    for name, store in stores.all().items():
        if len(store):
            yield name, upkeep.stat(store)


def _count(name: str, found: upkeep.Stat) -> str:
    kinds = "".join(f"\n{'':<12}{count:,} of {kind}" for kind, count in sorted(found.kinds.items()))
    size = f"{found.bytes / (1 << 20):,.1f} MiB, {found.bytes / max(1, found.entries) / 1024:,.1f} KiB each"
    return f"{name:<12}{found.entries:,} entries in {found.shards:,} files, {size}; index {found.index}{kinds}"


def _wanted(config: Config) -> Mapping[str, Keys]:
    """The keys that a config uses, by store."""
    base, opener = open_base(config.model.base, config.model.vae), opener_of(config)
    manifest = find_pictures(config, opener, read_quarantine(config.cache.folder))
    recipes = recipes_of(config, {"vae": base.digest("vae"), "text_encoders": base.digest("text_encoders")})
    return keys_of(lay_out(config, manifest, recipes, focus_points(config, manifest, opener)))


def names_of(manifest: Manifest) -> list[str]:
    """The names of all pictures."""
    return column(manifest, "name", np.arange(len(manifest)))


def keys_of(layout: Layout) -> dict[str, Keys]:
    """The keys (n, 16) of all entries that a layout uses, by store."""
    sides = (layout.train.samples, layout.held_out.samples)
    prompts = np.frombuffer(b"".join(layout.prompts.values()), np.uint8).reshape(-1, 16)
    masks = [side.mask_keys.reshape(-1, 16) for side in sides if side.mask_keys is not None]
    return {
        "latents": np.concatenate([side.latent_keys.reshape(-1, 16) for side in sides]),
        "texts": np.concatenate([prompts, *(side.text_keys for side in sides)]),
        "masks": np.concatenate([np.empty((0, 16), np.uint8), *(keys[keys.any(axis=1)] for keys in masks)]),
    }
