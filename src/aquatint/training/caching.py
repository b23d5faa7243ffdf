"""`aquatint cache`: build, check, count and clear what is encoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from aquatint.config.schema import Config
from aquatint.config.text_rules import trains_text
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
    return f"{len(data.manifest):,} pictures are ready\n{_counts(data.stores)}"


def verify_run(config: Config) -> str:
    """Reads every entry again, and removes what is damaged; looks at every picture's bytes again, whatever its file's dates say."""
    stores, lines = Stores.of(config.cache.folder), []
    with shared_lock(config.cache.folder):
        for name, store in stores.all().items():
            with track(f"reading {name}", len(store)) as on_progress:
                report = upkeep.verify(store, on_progress)
            if report.shards:
                lines.append(f"{name:<12}{_entries(report)}, {report.entries_lost:,} damaged")
            lines += [f"{'':<12}removed {shard}: {reason}" for shard, reason in report.removed.items()]
        before = find_pictures(config, opener_of(config), read_quarantine(config.cache.folder))
        after = find_pictures(config, opener_of(config), read_quarantine(config.cache.folder), rehash=True)
    known = dict(_contents(before))
    changed = [name for (source, name), digest in _contents(after) if known.get((source, name), digest) != digest]
    lines.append(f"{'pictures':<12}{len(after):,} read again, {len(changed):,} changed without a trace in their file's size and dates")
    return "\n".join([*lines, *(f"{'':<12}{name}: is encoded anew by the next build" for name in changed)])


def _contents(manifest: Manifest) -> Iterator[tuple[tuple[int, str], bytes]]:
    """Source, name and digest of each picture."""
    return zip(zip(manifest.source_of.tolist(), names_of(manifest), strict=True), map(bytes, manifest.digests), strict=True)


def stat_run(config: Config) -> str:
    """What is in the cache, and how much of it this config uses."""
    stores = Stores.of(config.cache.folder)
    return _counts(stores, _wanted(config))


def gc_run(configs: Sequence[Config], *, remove: bool) -> str:
    """Removes what none of the configs uses, or tells what that would be. Raises UsageError for configs of several caches."""
    folders = {config.cache.folder for config in configs}
    if len(folders) != 1:
        raise UsageError(
            f"these configs use {len(folders)} different caches", hint="clear one cache at a time, with all configs that use it"
        )
    per_config = [_wanted(config) for config in configs]
    lines, found = [], 0
    for name, store in Stores.of(folders.pop()).all().items():
        wanted = _different(one[name] for one in per_config)
        unused = len(store) - int(store.has(wanted).sum())
        report = upkeep.gc(store, wanted, dry_run=not remove)
        verb, rest = "removed" if remove else "would be removed", unused - report.entries_lost
        found += report.entries_lost
        if report.entries:
            stay = f"; {rest:,} more that nobody uses stay, in files that are used for the most part" if rest else ""
            lines.append(f"{name:<12}{report.entries_lost:,} of {report.entries:,} entries {verb}, {size_text(report.freed_bytes)}{stay}")
    what = "" if remove else "nothing was removed; `--remove` does it" if found else "there is nothing to remove"
    return "\n".join([*lines, *([what] if what else [])])


def _counts(stores: Stores, wanted: Mapping[str, Keys] | None = None) -> str:
    """What is in the stores, and how much of it is wanted."""
    lines = []
    for name, store in stores.all().items():
        keys = wanted[name] if wanted else ()
        if not len(store) and not len(keys):
            continue
        found = upkeep.stat(store)
        index = "" if found.index == "current" or not found.shards else f"; its index is {found.index}"
        each = f", {size_text(found.bytes_per_entry)} each" if found.entries else ""
        lines.append(f"{name:<12}{_entries(found)}, {size_text(found.bytes)}{each}{index}")
        lines += [f"{'':<12}{count:,} of {kind}" for kind, count in sorted(found.kinds.items())]
        if wanted is not None:
            lines.append(f"{'':<12}this config uses {len(keys):,}, and {int(store.has(keys).sum()):,} of these are there")
    return "\n".join(lines)


def _entries(found: upkeep.Stat | upkeep.Report) -> str:
    entries, files = "entry" if found.entries == 1 else "entries", "file" if found.shards == 1 else "files"
    return f"{found.entries:,} {entries} in {found.shards:,} {files}"


def size_text(num_bytes: float) -> str:
    """`3.9 KiB`, in the unit that fits."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if num_bytes >= size / 10:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / (1 << 10):,.1f} KiB"


def _wanted(config: Config) -> Mapping[str, Keys]:
    """The keys that a config uses, by store."""
    base, opener = open_base(config.model.base, config.model.vae), opener_of(config)
    manifest = find_pictures(config, opener, read_quarantine(config.cache.folder))
    recipes = recipes_of(config, {"vae": base.digest("vae_encoder"), "text_encoders": base.digest("text_encoders")})
    keys = keys_of(lay_out(config, manifest, recipes, focus_points(config, manifest, opener)))
    return keys | {"texts": keys["texts"][:0]} if trains_text(config) else keys


def names_of(manifest: Manifest) -> list[str]:
    """The names of all pictures."""
    return column(manifest, "name", np.arange(len(manifest)))


def keys_of(layout: Layout) -> dict[str, Keys]:
    """The keys (n, 16) of all entries that a layout uses, each once, by store."""
    sides = (layout.train.samples, layout.held_out.samples, layout.known.samples)
    prompts = np.frombuffer(b"".join(layout.prompts.values()), np.uint8).reshape(-1, 16)
    masks = [side.mask_keys.reshape(-1, 16) for side in sides if side.mask_keys is not None]
    return {
        "latents": _different(side.latent_keys.reshape(-1, 16) for side in sides),
        "texts": _different([prompts, *(side.text_keys for side in sides)]),
        "masks": _different([np.empty((0, 16), np.uint8), *(keys[keys.any(axis=1)] for keys in masks)]),
    }


def _different(parts: Iterable[Keys]) -> Keys:
    return np.unique(np.concatenate(list(parts)), axis=0)
