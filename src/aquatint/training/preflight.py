"""Facts that decide whether a run can work, found out before anything is loaded: files, folders, disks and packages.

No torch, and nothing is written or made: this is what `aquatint check` runs.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from aquatint.config.check import REMARKS, find
from aquatint.config.schema import Config
from aquatint.data.downloads import public_name
from aquatint.errors import AquatintError, DataError, Problem, StorageError
from aquatint.models.adapter_files import check_adapter
from aquatint.models.sdxl.load import BaseModel, open_base
from aquatint.models.sdxl.model import ModelSpec
from aquatint.optim.library import missing_package
from aquatint.planning.batch import is_open, with_batch_size
from aquatint.planning.disk import cache_bytes_per_picture, checkpoint_bytes, exported_part, vae_checkpoint_bytes, vae_export_bytes
from aquatint.planning.groups import group_findings
from aquatint.planning.main_memory import machine_bytes, plan_main_memory, shortage
from aquatint.planning.memory import on_gpu
from aquatint.planning.sources import Listing, is_remote, list_source, sources_of
from aquatint.planning.trained import adapter_spec, trainable_shapes, weight_shapes
from aquatint.storage import check_writable, free_bytes
from aquatint.training.process import conflicts, remarks

MIB, GIB = 1 << 20, 1 << 30
_MAX_NAMED = 3  # files that a message names


@dataclass
class Inspection:
    """What was looked at, what is worth knowing, and what must be changed.

    `place` says where a setting was written; settings in `broken` have no value of the user's and are not looked at.
    """

    config: Config
    place: Callable[[str], str] = lambda key: ""
    broken: AbstractSet[str] = frozenset()
    looked_at: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, key: str, message: str, hint: str) -> None:
        self.problems.append(Problem(message, hint, self.place(key)))

    def knows(self, *keys: str) -> bool:
        """Whether the values of all these settings are the user's."""
        prefixes = {".".join(key.split(".")[:length]) for key in keys for length in range(1, key.count(".") + 2)}
        return not prefixes & self.broken


def preflight(config: Config) -> list[Problem]:
    """Everything that would stop a run of this config, as far as files, folders, disks and packages tell."""
    return inspect(Inspection(config)).problems


def inspect(found: Inspection) -> Inspection:
    """Looks at all that the config names, and adds to `found` what there is to say."""
    base = _inspect_base(found) if found.knows("model.base") else None
    listings = _list_sources(found)
    _inspect_captions(found, listings)
    num_pictures = sum(listing.num_pictures for listing in listings.values())
    _inspect_amount(found, listings)
    if found.knows("run.folder", "run.name", "cache.folder"):
        _inspect_folders(found)
        if base is not None:
            _inspect_space(found, base.spec, num_pictures)
            _inspect_main_memory(found, base.spec)
    _inspect_packages(found)
    found.notices += [f"{remark.message}: {remark.hint}" for remark in find(REMARKS, found.config, found.broken)]
    return found


def inspect_vae(found: Inspection) -> Inspection:
    """The same for `aquatint train-vae`, which reads pictures alone, encodes nothing ahead, and has a folder of its own."""
    base = _open_base(found) if found.knows("model.base") else None
    _list_sources(found)
    if found.knows("vae_training.perceptual_model"):
        _inspect_perceptual(found)
    if found.knows("run.folder", "run.name", "cache.folder"):
        _inspect_folders(found)
        if base is not None:
            _inspect_vae_space(found, base.spec)
    _inspect_trackers(found)
    return found


def _inspect_perceptual(found: Inspection) -> None:
    path = found.config.vae_training.perceptual_model
    if path is not None and not path.is_file():
        hint = "check the spelling; relative paths start at the config file, and docs/vae.md says how to make it"
        found.problem("vae_training.perceptual_model", f"there is no file {path}", hint)


def _open_base(found: Inspection) -> BaseModel | None:
    section = found.config.model
    try:
        base = open_base(section.base, section.vae)
    except AquatintError as error:
        key = "model.vae" if section.vae is not None and _opens(section.base) else "model.base"
        found.problem(key, error.message, error.hint)
        return None
    found.looked_at.append(f"base model: {base.path}: SDXL, {base.layout.replace('_', ' ')}, {base.process.words()}")
    return base


def _inspect_base(found: Inspection) -> BaseModel | None:
    base = _open_base(found)
    if base is None:
        return None
    if found.knows("model", "samples", "noise", "timesteps", "diffusion"):
        against = list(conflicts(found.config, base))
        for conflict in against:
            found.problem(conflict.key, conflict.message, conflict.hint)
        found.notices += [] if against else remarks(found.config, base)
    if found.knows("adapter", "text_encoders"):
        _inspect_start(found, base)
    if found.knows("adapter", "text_encoders", "training.groups"):
        for finding in group_findings(found.config, trainable_shapes(found.config, base.spec)):
            found.problem(finding.keys[0], finding.message, finding.hint)
    return base


def _inspect_start(found: Inspection, base: BaseModel) -> None:
    """Whether an adapter can start from the file that it is to start from."""
    spec, path = adapter_spec(found.config), found.config.adapter.start_from
    if spec is None or path is None:
        return
    try:
        check_adapter(path, weight_shapes(found.config, base.spec), spec)
    except AquatintError as error:
        found.problem("adapter.start_from", error.message, error.hint)
    else:
        found.looked_at.append(f"adapter: {path}: {spec.kind} of rank {spec.rank}")


def _opens(path: Path) -> bool:
    try:
        open_base(path)
    except AquatintError:
        return False
    return True


def _list_sources(found: Inspection) -> dict[int, Listing]:
    """What each source lists that can be read, by the source's index."""
    listings = {}
    for index, source in enumerate(sources_of(found.config)):
        key = f"data.sources.{index}.path"
        if not found.knows(key, *(f"data.sources.{index}.{name}" for name in ("kind", "caption_extensions"))):
            continue
        if is_remote(source):
            found.looked_at.append(f"pictures: {public_name(source.path)} is elsewhere, and is looked at when the run begins")
            continue
        path = Path(source.path)
        if source.kind == "folder" and not path.is_dir():
            message = f"{path} is a file, not a folder" if path.exists() else f"there is no folder {path}"
            found.problem(key, message, "name the folder that holds the pictures" if path.exists() else _nearby(path))
            continue
        try:
            listings[index] = list_source(source)
        except DataError as error:
            found.problem(key, error.message, error.hint)
            continue
        _inspect_listing(found, key, path, listings[index])
    return listings


def _nearby(folder: Path) -> str:
    """A hint for a folder that is not there: one that is, and is spelt alike."""
    parent = _existing(folder)
    wrong = folder.relative_to(parent).parts[0]
    names = [entry.name for entry in os.scandir(parent) if entry.is_dir()] if parent.is_dir() and os.access(parent, os.R_OK) else []
    alike = difflib.get_close_matches(wrong, names, n=1)
    there = f"there is {parent / alike[0]}" if alike else "relative paths start at the config file"
    return f"check the spelling; {there}"


def _inspect_listing(found: Inspection, key: str, path: Path, listing: Listing) -> None:
    if listing.num_pictures:
        captioned = listing.num_pictures - len(listing.bare)
        found.looked_at.append(f"pictures: {listing.num_pictures:,} in {path}, {captioned:,} with a caption")
    else:
        others = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in sorted(listing.remarks.others.items()))
        message = f"there are no pictures in {path}" + (f", only other files ({others})" if others else "")
        found.problem(key, message, "name the folder or table that holds them; folders inside a folder are read too")
    found.notices += listing.remarks.warnings[:_MAX_NAMED]
    problems = listing.remarks.problems
    if problems:
        some = "; ".join(f"{name}: {reason}" for name, reason in problems[:_MAX_NAMED]) + (" …" if len(problems) > _MAX_NAMED else "")
        found.notices.append(f"{len(problems):,} of what {path} lists cannot be used: {some}")


def _inspect_captions(found: Inspection, listings: dict[int, Listing]) -> None:
    """Complains where the run would: when too many of all pictures to train on have neither a caption nor trigger words."""
    sources = found.config.data.sources
    trained = {index: listing for index, listing in listings.items() if sources[index].role != "validation"}
    without = {index: listing for index, listing in trained.items() if not sources[index].trigger.strip()}
    bare = [name for listing in without.values() for name in listing.bare]
    total = sum(listing.num_pictures for listing in trained.values())
    limit = found.config.data.max_uncaptioned_share
    if not found.knows("data.max_uncaptioned_share") or not bare or len(bare) <= limit * total:
        return
    worst = max(without, key=lambda index: len(without[index].bare))
    names = ", ".join(bare[:_MAX_NAMED]) + (" …" if len(bare) > _MAX_NAMED else "")
    counts = listings[worst].remarks.others
    others = Counter({ending: count for ending, count in counts.items() if ending and 2 * count >= len(listings[worst].bare)})
    endings = " or ".join(sources[worst].caption_extensions)
    advice = (
        f'set `caption_extensions = ["{others.most_common(1)[0][0]}"]` if those are the captions'
        if others
        else f"write them to {endings} files"
    )
    found.problem(
        f"data.sources.{worst}.caption_extensions",
        f"{len(bare):,} of {total:,} pictures have no caption ({names})",
        f"{advice}, or set `data.max_uncaptioned_share = 1` to train without",
    )


def _inspect_amount(found: Inspection, listings: dict[int, Listing]) -> None:
    training, sources = found.config.training, found.config.data.sources
    if len(listings) < len(sources):
        return  # there may be more in those that could not be looked at
    per_step = training.per_step
    num_pictures = sum(listing.num_pictures for index, listing in listings.items() if sources[index].role != "validation")
    if 0 < num_pictures < per_step and found.knows("training.batch_size", "training.accumulation_steps"):
        found.notices.append(
            f"every step takes {per_step} pictures, and there are only {num_pictures}: each is seen more than once per step"
        )


def _inspect_folders(found: Inspection) -> None:
    for key, folder in ("run.folder", found.config.run.folder), ("cache.folder", found.config.cache.folder):
        existing = _existing(folder)
        try:
            if not existing.is_dir():
                raise StorageError(f"cannot make {folder}: {existing} is a file", hint="choose another folder")
            check_writable(existing)
        except StorageError as error:
            found.problem(key, error.message, error.hint)


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _inspect_space(found: Inspection, spec: ModelSpec, num_pictures: int) -> None:
    """Compares what the run and its cache still need with the space on their disks, which may be one and the same."""
    config = found.config
    one = checkpoint_bytes(config, spec)
    keep = config.checkpoints.keep + config.checkpoints.keep_best
    checkpoints = one * (keep + 1)  # one more while it is written
    exports = exported_part(config, spec).bytes
    cache = cache_bytes_per_picture(config, spec) * num_pictures
    folders = {"run.folder": config.run.folder, "cache.folder": config.cache.folder}
    needs = {
        "run.folder": max(0, checkpoints + exports - size_of(config.run.folder / config.run.name)),
        "cache.folder": max(0, cache - size_of(config.cache.folder)),
    }
    _inspect_disks(found, folders, needs, f"{keep} + 1 checkpoints of {gib(one)}, export {gib(exports)}, cache {gib(cache)}")


def _inspect_vae_space(found: Inspection, spec: ModelSpec) -> None:
    """The same for `train-vae`, which adds nothing to the cache."""
    config, one = found.config, vae_checkpoint_bytes(spec)
    keep, exports = config.checkpoints.keep, vae_export_bytes(config, spec)
    there = size_of(config.run.folder / f"{config.run.name}-vae")
    need = max(0, one * (keep + 1) + exports - there)
    parts = f"{keep} + 1 checkpoints of {gib(one)}, export {gib(exports)}"
    _inspect_disks(found, {"run.folder": config.run.folder}, {"run.folder": need}, parts)


def _inspect_disks(found: Inspection, folders: Mapping[str, Path], needs: Mapping[str, int], parts: str) -> None:
    """What the folders of these settings still need, against the space on their disks. `parts` says what it is made of."""
    disks: dict[int, list[str]] = {}
    for key, folder in folders.items():
        disks.setdefault(_existing(folder).stat().st_dev, []).append(key)
    for keys in disks.values():
        need, free = sum(needs[key] for key in keys), free_bytes(folders[keys[0]])
        names = " and ".join(f"`{key}`" for key in keys)
        found.looked_at.append(f"disk of {names}: {gib(free)} free, about {gib(need)} needed ({parts})")
        if need > free:
            message = f"the disk of {names} is too small: about {gib(need)} needed, {gib(free)} free"
            found.problem(keys[0], message, f"free some space, choose another disk, or lower `checkpoints.keep` ({parts})")


def _inspect_main_memory(found: Inspection, spec: ModelSpec) -> None:
    """Says so if a run on a GPU wants more main memory than there is; that of a run on a CPU is for `plan`, which takes longer."""
    config = found.config
    if not on_gpu(config):
        return
    whole = with_batch_size(config, config.training.per_step) if is_open(config) else config
    if lack := shortage(plan_main_memory(whole, spec), machine_bytes()):
        found.notices.append(f"{lack}: `aquatint plan` shows what for")


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; 0 if it is not there."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def gib(value: float) -> str:
    """`9.6 GiB`, or MiB where that would be 0.0."""
    return f"{value / GIB:,.1f} GiB" if value >= GIB / 20 else f"{value / MIB:,.1f} MiB"


def _inspect_trackers(found: Inspection) -> None:
    tracking = found.config.tracking
    wanted = {"tracking.tensorboard": ("tensorboard", tracking.tensorboard), "tracking.wandb.enabled": ("wandb", tracking.wandb.enabled)}
    for key, (package, needed) in wanted.items():
        if needed and find_spec(package) is None:
            hint = f"`pip install aquatint[{package}]`, or leave out `{key}`; metrics.jsonl is always written"
            found.problem(key, f"the package {package} is not installed, and it is needed for `{key}`", hint)


def _inspect_packages(found: Inspection) -> None:
    _inspect_trackers(found)
    if found.knows("optimizer.name") and (missing := missing_package(found.config.optimizer.name)) is not None:
        found.problem("optimizer.name", *missing)
    if found.config.cache.engine == "ray" and find_spec("ray") is None:
        hint = '`pip install aquatint[ray]`, or set `cache.engine = "processes"` for several GPUs of one machine'
        found.problem("cache.engine", 'the package ray is not installed, and it is needed for `cache.engine = "ray"`', hint)
    if found.config.crop.mode == "focus" and find_spec("smartcrop") is None:
        hint = '`pip install aquatint[focus]`, or leave out `crop.mode`, which then is "center"'
        found.problem("crop.mode", 'the package smartcrop is not installed, and it is needed for `crop.mode = "focus"`', hint)
