"""From the config's sources to everything the loader needs: pictures found, laid out, and encoded where they are not cached."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from aquatint.config.schema import Config
from aquatint.config.text_rules import trains_text
from aquatint.data.cache import FILE_CHANGED, NOT_FINITE, CaptionEncoder, LatentEncoder, build_latents, build_masks, build_texts
from aquatint.data.engines import Engine, choose_engine
from aquatint.data.loader import Entries
from aquatint.data.manifest import Manifest, some_names
from aquatint.data.places import Opener
from aquatint.data.samples import Keys, Samples, Words
from aquatint.data.shards import ShardStore
from aquatint.errors import DataError, StorageError
from aquatint.models.sdxl.load import BaseModel, open_base
from aquatint.models.sdxl.tokenizer import chunk_report
from aquatint.training.find import find_pictures, opener_of, read_quarantine, write_quarantine
from aquatint.training.focus_points import focus_points
from aquatint.training.layout import Layout, Recipes, Side, latent_requests, lay_out, mask_requests, plan_digest, recipes_of
from aquatint.training.parallelize import choose_device
from aquatint.training.process import wanted_process
from aquatint.training.reasons import Wanted, in_words, name_digests, reasons, remember, remembered
from aquatint.utils.progress import track

Say = Callable[[str], None]
PASSING = (FILE_CHANGED, NOT_FINITE)  # reasons that say nothing about a content for good
EMPTY = ""


@dataclass(frozen=True)
class Stores:
    """The cache's folders."""

    latents: ShardStore
    texts: ShardStore
    masks: ShardStore

    @classmethod
    def of(cls, folder: Path, memory_bytes: int = 0) -> Stores:
        """Opens them. Latents are what memory is kept for: they are read once a lap, and nothing else holds them."""
        return cls(ShardStore(folder / "latents", memory_bytes=memory_bytes), ShardStore(folder / "texts"), ShardStore(folder / "masks"))

    def all(self) -> dict[str, ShardStore]:
        return {"latents": self.latents, "texts": self.texts, "masks": self.masks}


@dataclass(frozen=True)
class Prepared:
    """The data side of a run. `digest` changes with anything that decides a batch."""

    layout: Layout
    stores: Stores
    entries: Entries
    digest: str

    @property
    def manifest(self) -> Manifest:
        return self.layout.manifest

    @property
    def train(self) -> Samples:
        return self.layout.train.samples

    @property
    def held_out(self) -> Samples:
        return self.layout.held_out.samples

    @property
    def known(self) -> Samples:
        return self.layout.known.samples

    @cached_property
    def samples_per_epoch(self) -> int:
        """To the nearest sample: with broken repeats an epoch may have one more or less."""
        return max(1, round(sum(group.count * group.repeats for groups in self.layout.groups for group in groups)))


def prepare(config: Config, base: BaseModel, *, say: Say) -> Prepared:
    """Finds, lays out and encodes. A picture that turns out to be undecodable is quarantined, and the layout made anew.

    Raises DataError when too many pictures cannot be used, StorageError when the cache cannot be written.
    """
    folder = config.cache.folder
    stores = Stores.of(folder, config.cache.memory_mib << 20)
    for store in stores.all().values():
        for shard, reason in store.discarded.items():
            say(f"warning: the cache file {shard} was damaged and is made again ({reason})")
    opener = opener_of(config)
    quarantine = read_quarantine(folder)
    digests = {"vae": base.digest("vae_encoder"), "text_encoders": base.digest("text_encoders")}
    recipes = recipes_of(config, digests)

    def set_aside(digest: bytes, reason: str) -> None:
        """Written down at once: whoever goes on after a crash leaves out the same pictures, and so makes the same shards."""
        say(f"quarantined: {_blamed(manifest, digest)}{reason}")
        quarantine[digest] = reason
        write_quarantine(folder, {one: why for one, why in quarantine.items() if why not in PASSING})

    while True:
        manifest = find_pictures(config, opener, quarantine)
        layout = lay_out(config, manifest, recipes, focus_points(config, manifest, opener))
        build = _Build(config, layout, recipes, digests, stores, opener, say, set_aside)
        if not build.all():
            break
    build.remember()
    entries = Entries(
        stores.latents, stores.texts, stores.masks, wanted_process(config, base).latents, layout.prompts[EMPTY],
        mask_floor=config.data.mask_floor,
    )  # fmt: skip
    return Prepared(layout, stores, entries, plan_digest(config, layout))


def _blamed(manifest: Manifest, digest: bytes) -> str:
    """`a.png, b.png: `, the pictures of this content; or `a.png: its mask `, those with a mask of this content."""
    for column, what in (manifest.digests, ""), (manifest.mask_digests, "its mask "):
        rows = np.flatnonzero((column == np.frombuffer(digest, np.uint8)).all(axis=1))
        if len(rows):
            return f"{some_names(manifest, rows)}: {what}"
    raise KeyError(f"no picture has the content {digest.hex()}")


# Encoders, as functions that another process can call too


def make_vae_encoder(base: Path, vae: Path | None, device: str, precision: str) -> LatentEncoder:
    """The autoencoder of a base model, ready to encode."""
    return open_base(base, vae).vae_encoder(torch.device(device), precision)  # type: ignore[arg-type]


def make_caption_encoder(base: Path, vae: Path | None, device: str) -> CaptionEncoder:
    """The text encoders of a base model, ready to encode."""
    return open_base(base, vae).caption_encoder(torch.device(device))


def count_chunks(caption: str) -> int:
    """How many chunks of 77 a caption fills."""
    return chunk_report(caption).num_chunks


# What is missing


@dataclass(frozen=True)
class _Build:
    """Encodes what a layout needs and the cache does not have. Encoders are made only if something is missing, one at a time."""

    config: Config
    layout: Layout
    recipes: Recipes
    encoder_digests: Mapping[str, str]
    stores: Stores
    opener: Opener
    say: Say
    set_aside: Callable[[bytes, str], None]

    def all(self) -> dict[bytes, str]:
        """Texts, masks and latents; returns the pictures that could not be encoded: digest -> reason."""
        self._texts()
        failures: dict[bytes, str] = {}
        for side in self.sides:
            failures |= self._masks(side)
        for side in self.sides:
            failures |= self._latents(side)
        return failures

    @property
    def sides(self) -> tuple[Side, Side, Side]:
        return self.layout.train, self.layout.held_out, self.layout.known

    @cached_property
    def engine(self) -> Engine:
        section = self.config.cache
        return choose_engine(section.engine, section.workers, gpus=self.device == "cuda")

    @cached_property
    def device(self) -> str:
        return choose_device(self.config.training.device).type

    @property
    def packing(self) -> dict[str, int]:
        return {"batch_size": self.config.cache.batch_size, "shard_entries": self.config.cache.shard_entries}

    def _texts(self) -> None:
        if trains_text(self.config):
            return
        texts = [(side.texts, side.samples.text_keys) for side in self.sides]
        missing = [text for texts, keys in texts for text, there in zip(texts, self.stores.texts.has(keys), strict=True) if not there]
        missing += [text for text, key in self.layout.prompts.items() if key not in self.stores.texts]
        missing = list(dict.fromkeys(missing))
        if not missing:
            return
        train = self.layout.train.samples
        rows = _rows_of(~self.stores.texts.has(train.text_keys), train)
        self.say(f"captions    {len(missing):,} to encode{self._why('texts', rows)}")
        make = partial(make_caption_encoder, self.config.model.base, self.config.model.vae, self.device)
        with track("encoding captions", len(missing)) as on_progress:
            failed = build_texts(
                self.stores.texts, missing, make, recipe=self.recipes.texts, num_chunks=count_chunks,
                dtype=self.config.cache.text_dtype, engine=self.engine, on_progress=on_progress, **self.packing,
            )  # fmt: skip
        for caption, reason in failed.items():
            raise DataError(f"the caption {caption!r} cannot be encoded: {reason}", hint="the text encoders in model.base may be damaged")

    def _masks(self, side: Side) -> dict[bytes, str]:
        keys = side.samples.mask_keys
        if keys is None:
            return {}
        missing = keys.any(axis=2) & ~_has(self.stores.masks, keys)
        if not missing.any():
            return {}
        count = _count_different(keys[missing])
        self.say(f"masks       {count:,} to make")
        with track("making masks", count) as on_progress:
            return build_masks(
                self.stores.masks, mask_requests(self.layout.manifest, side, missing), opener=self.opener,
                max_pixels=self.config.data.max_pixels, on_progress=on_progress, on_failure=self.set_aside, **self.packing,
            )  # fmt: skip

    def _latents(self, side: Side) -> dict[bytes, str]:
        missing = ~_has(self.stores.latents, side.samples.latent_keys)
        if not missing.any():
            return {}
        rows = np.flatnonzero(missing.any(axis=1))
        which, label = self._names_of(side)
        count = _count_different(side.samples.latent_keys[missing])
        views = f" views of {len(rows):,} pictures" if side.samples.num_views > 1 else ""
        self.say(f"{label:<12}{count:,}{views} to encode{self._why(which, rows)}")
        section = self.config.cache
        make = partial(make_vae_encoder, self.config.model.base, self.config.model.vae, self.device, section.vae_precision)
        with track("encoding pictures", count) as on_progress:
            return build_latents(
                self.stores.latents, latent_requests(self.layout.manifest, side, missing), make, opener=self.opener,
                alpha_color=self.config.data.alpha_color, max_pixels=self.config.data.max_pixels, dtype=section.latent_dtype,
                engine=self.engine, on_progress=on_progress, on_failure=self.set_aside, **self.packing,
            )  # fmt: skip

    # Why it is missing

    def _names_of(self, side: Side) -> tuple[str, str]:
        """What the latents of a side are remembered as, and what they are called."""
        if side is self.layout.train:
            return "latents", "pictures"
        return ("held_out", "held out") if side is self.layout.held_out else ("known", "measured")

    def _why(self, kind: str, rows: npt.NDArray[np.int64]) -> str:
        """`: 3 new, 1 whose file changed`, of the pictures that what is missing belongs to."""
        found = reasons(self._wanted(kind), remembered(self._memory(kind)), rows)
        return f": {in_words(found)}" if found else ""

    def remember(self) -> None:
        """Keeps what was wanted, for the next time something is missing. It is no loss if that fails."""
        with contextlib.suppress(StorageError):
            for kind in ("latents", "held_out", "known", "texts"):
                remember(self._memory(kind), self._wanted(kind))

    def _memory(self, kind: str) -> Path:
        """One file for each set of sources, by their names: several runs share a cache, and folders are moved."""
        paths = "\n".join(sorted(Path(source.path).name for source in self.config.data.sources))
        return (
            self.config.cache.folder / "index" / f"wanted-{hashlib.blake2b(paths.encode(), digest_size=8).hexdigest()}-{kind}.safetensors"
        )

    def _wanted(self, kind: str) -> Wanted:
        side = {"held_out": self.layout.held_out, "known": self.layout.known}.get(kind, self.layout.train)
        samples, section = side.samples, self.config.cache
        names = name_digests([samples.names[row] for row in range(len(samples))])
        if kind == "texts":
            words = samples.captions or Words.of(side.texts)
            texts = ["\n".join(words[text] for text in samples.text_of[row]) for row in range(len(samples))]
            recipe = {
                "because the text encoders changed": self.encoder_digests["text_encoders"],
                "because cache.text_dtype changed": section.text_dtype,
                "because the settings in captions changed": repr(self.layout.policies),
            }
            return Wanted(names, {"whose caption changed": name_digests(texts)}, recipe)
        recipe = {
            "because the autoencoder changed": self.encoder_digests["vae"],
            "because cache.vae_precision changed": section.vae_precision,
            "because cache.latent_dtype changed": section.latent_dtype,
            "because data.alpha_color changed": self.config.data.alpha_color.lower(),
        }
        crops = np.ascontiguousarray(side.crops.reshape(len(samples), side.crops.shape[1] * side.crops.shape[2])).view(np.uint8)
        digests = self.layout.manifest.digests[side.rows]
        parts = {
            "whose file changed": digests,
            "whose bucket, crop or flip changed": crops,
            "that are decoded at another size": side.reductions.view(np.uint8),
        }
        return Wanted(names, parts, recipe)


def _has(store: ShardStore, keys: Keys) -> npt.NDArray[np.bool_]:
    """Which of the keys (n, V, 16) are in the store, (n, V)."""
    return store.has(keys.reshape(-1, 16)).reshape(keys.shape[:2])


def _count_different(keys: Keys) -> int:
    """How many of the keys (n, 16) are different: copies, and crops that come out alike, share one."""
    data = np.ascontiguousarray(keys).tobytes()
    return len({data[start : start + 16] for start in range(0, len(data), 16)})


def _rows_of(missing: npt.NDArray[np.bool_], samples: Samples) -> npt.NDArray[np.int64]:
    """The rows that any of the missing texts belongs to."""
    if samples.captions is not None:
        return np.arange(0)
    return np.unique(np.searchsorted(samples.text_of.starts, np.flatnonzero(missing), side="right") - 1)
