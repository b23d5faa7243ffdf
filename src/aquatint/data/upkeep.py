"""Looking after a cache folder: is it sound, what is in it, and what of it is no longer wanted.

`gc` removes, so it works only while no run relies on the cache: runs hold `storage.shared_lock` on the folder around the
stores (`cache.folder`), and `gc` takes the same lock for itself alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from aquatint.data.shard_file import write_shard
from aquatint.data.shard_index import INDEX_NAME, KEY_BYTES, Bools, Field, Int64s, Keys, ShardIndex, load_index
from aquatint.data.shards import ShardStore
from aquatint.storage import exclusive_lock

Progress = Callable[[int, int], None]

UNWANTED = "none of its entries is wanted"


@dataclass(frozen=True)
class Report:
    """What was looked at, and what became of it. `entries_lost` were damaged, or not wanted, and are no longer there.

    `removed` has the reason for each shard that is gone, `rewritten` the shard that the wanted entries of one are in now
    (empty in a dry run, where nobody knows its name yet).
    """

    shards: int
    entries: int
    entries_lost: int = 0
    freed_bytes: int = 0
    removed: Mapping[str, str] = field(default_factory=dict)
    rewritten: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stat:
    """What is in a store. `copies` are entries that another shard has too. `kinds` counts entries by what they are made of.

    `index` tells whether the next start will have to open shards to learn what is in them: not if it is current.
    `largest` is the shard of the most bytes; empty where there is none.
    """

    entries: int
    shards: int
    bytes: int
    copies: int
    kinds: Mapping[str, int]
    index: Literal["current", "out of date", "missing", "damaged"]
    largest: str
    largest_bytes: int

    @property
    def bytes_per_entry(self) -> float:
        return self.bytes / self.entries if self.entries else 0.0


def verify(store: ShardStore, on_progress: Progress = lambda done, total: None) -> Report:
    """Reads every entry of every shard, and removes the shards that are damaged: the next build makes their entries again.

    `on_progress` gets how many entries are done, and how many there are. Raises StorageError.
    """
    store.refresh()
    index = store.index
    removed = dict(store.discarded)
    num_shards = len(removed) + len(index.names)
    done, total = 0, len(index.keys)
    for name, layout in zip(index.names, index.layouts, strict=True):
        if (reason := store.check(name)) is not None:
            removed[name] = reason
        done += layout.num_entries
        on_progress(done, total)
    gone = [layout.file_bytes for name, layout in zip(index.names, index.layouts, strict=True) if name in removed]
    store.save_index()
    return Report(num_shards, len(index), len(index) - len(store), sum(gone), removed)


def stat(store: ShardStore) -> Stat:
    """Counts what is there, from the index alone."""
    index = store.index
    kinds: Counter[str] = Counter()
    for layout in index.layouts:
        kinds[describe(layout.fields)] += layout.num_entries
    sizes = {name: layout.file_bytes for name, layout in zip(index.names, index.layouts, strict=True)}
    largest = max(sizes, key=lambda name: (sizes[name], name), default="")
    return Stat(
        entries=len(index),
        shards=len(index.names),
        bytes=sum(sizes.values()),
        copies=len(index.keys) - len(index),
        kinds=dict(kinds.most_common()),
        index=_index_state(store),
        largest=largest,
        largest_bytes=sizes.get(largest, 0),
    )


def describe(fields: Sequence[Field]) -> str:
    """`mean F16 4x128x128, std F16 4x128x128`."""
    return ", ".join(f"{field.name} {field.dtype} {'x'.join(map(str, field.shape)) or 'number'}" for field in fields)


def _index_state(store: ShardStore) -> Literal["current", "out of date", "missing", "damaged"]:
    if not (store.folder / INDEX_NAME).exists():
        return "missing"
    saved = load_index(store.folder)
    if saved is None:
        return "damaged"
    return "current" if saved.names == store.index.names else "out of date"


# Removing what is not wanted


def gc(store: ShardStore, wanted: Keys, *, min_live_share: float = 0.5, dry_run: bool = False) -> Report:
    """Removes the shards without a wanted entry, and packs those anew of which less than `min_live_share` is wanted.

    `wanted` is (n, 16). What is packed anew is written before the old is removed, so a crash loses nothing. Raises
    LockedError while a run uses the cache, ValueError for a share outside 0..1, StorageError. A dry run only tells.
    """
    if not 0 <= min_live_share <= 1:
        raise ValueError(f"min_live_share is a share, and {min_live_share} is not between 0 and 1")
    if dry_run:
        store.refresh()
        return _collect(store, wanted, min_live_share, pack=lambda keys: "")
    with exclusive_lock(store.folder.parent):
        store.remove_abandoned()
        store.refresh()
        report = _collect(store, wanted, min_live_share, pack=lambda keys: _pack(store, keys))
        store.refresh()
        store.remove((report.removed.keys() | report.rewritten.keys()) - set(report.rewritten.values()))
        store.save_index()
    return report


def _collect(store: ShardStore, wanted: Keys, min_live_share: float, *, pack: Callable[[Keys], str]) -> Report:
    """What to remove, after the wanted part of it was packed anew."""
    index = store.index
    live = _live(index, wanted)
    counts = np.bincount(index.shards[live], minlength=len(index.names))
    thin = [number for number, layout in enumerate(index.layouts) if 0 < counts[number] < min_live_share * layout.num_entries]
    rewritten: dict[str, str] = {}
    for group in _groups(index, thin, counts):
        name = pack(index.keys[live & _in_shards(index, group)])
        rewritten |= {index.names[number]: name for number in group}
    dead = [number for number in range(len(index.names)) if counts[number] == 0 and index.names[number] not in rewritten.values()]
    before = sum(index.layouts[number].file_bytes for number in (*dead, *thin))
    after = sum(int(counts[number]) * (index.layouts[number].entry_bytes + 2 * KEY_BYTES) for number in thin)
    staying = live | ~_in_shards(index, [*dead, *thin])
    keys_staying = np.unique(np.cumsum(index.distinct)[staying])
    return Report(
        shards=len(index.names),
        entries=len(index),
        entries_lost=len(index) - len(keys_staying),
        freed_bytes=max(0, before - after),
        removed={index.names[number]: UNWANTED for number in dead},
        rewritten=rewritten,
    )


def _live(index: ShardIndex, wanted: Keys) -> Bools:
    """Which entries are wanted, (n,): of a key in several shards, the one that is read."""
    live = np.zeros(len(index.keys), np.bool_)
    places = index.places(wanted)
    live[places[places >= 0]] = True
    return live


def _groups(index: ShardIndex, numbers: Iterable[int], counts: Int64s) -> list[list[int]]:
    """Shards that are packed into one: they look alike, and together are not larger than the largest of them was."""
    by_fields: dict[tuple[Field, ...], list[int]] = {}
    for number in numbers:
        by_fields.setdefault(index.layouts[number].fields, []).append(number)
    groups: list[list[int]] = []
    for alike in by_fields.values():
        room = 0
        for number in alike:
            if counts[number] > room:
                groups.append([])
                room = max(index.layouts[other].num_entries for other in alike)
            groups[-1].append(number)
            room -= counts[number]
    return groups


def _in_shards(index: ShardIndex, numbers: Sequence[int]) -> Bools:
    """Which entries are in these shards, (n,)."""
    chosen = np.zeros(len(index.names), np.bool_)
    chosen[list(numbers)] = True
    return chosen[index.shards]


def _pack(store: ShardStore, keys: Keys) -> str:
    """Writes entries as a shard of their own, which the store does not know of yet, and returns its name."""
    return write_shard(store.folder, {key.tobytes(): store.read(key.tobytes()) for key in keys})
