"""From the config's folders to everything the loader needs: pictures found, shapes planned, latents and texts encoded.

This module and `build` are the composition root: the only ones that hand the config's values to the rooms below.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from aquatint.config.schema import Config
from aquatint.data import buckets as bucket_planning
from aquatint.data.batch import Item, View
from aquatint.data.cache import FILE_CHANGED, NOT_FINITE, LatentRequest, build_latents, build_texts, latent_key, text_key
from aquatint.data.captions import variants as caption_variants
from aquatint.data.crop import Crop, views
from aquatint.data.manifest import Manifest, Picture, Source, check_limits, scan, split
from aquatint.data.shards import ShardStore
from aquatint.errors import DataError
from aquatint.models.sdxl.load import BaseModel
from aquatint.storage import write_json
from aquatint.training.parallelize import choose_device
from aquatint.utils.progress import track

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """The data side of a run. Groups of items have one shape each; `digest` changes with anything that decides a batch."""

    manifest: Manifest
    bucket_rows: tuple[bucket_planning.BucketRow, ...]
    train: tuple[tuple[Item, ...], ...]
    held_out: tuple[tuple[Item, ...], ...]
    latents: ShardStore
    texts: ShardStore
    text_keys: Mapping[str, str]
    digest: str

    @property
    def samples_per_epoch(self) -> int:
        return sum(len(group) for group in self.train)


@dataclass(frozen=True)
class _Layout:
    """Which picture goes where in which form, and what has to be in the cache for that."""

    plan: bucket_planning.BucketPlan
    bucket_rows: tuple[bucket_planning.BucketRow, ...]
    train: tuple[tuple[Item, ...], ...]
    held_out: tuple[tuple[Item, ...], ...]
    wanted: _Wanted
    text_keys: Mapping[str, str]


@dataclass(frozen=True)
class _Wanted:
    """Makes items of pictures, and collects by key what they need from the cache."""

    config: Config
    encoder_digests: Mapping[str, str]
    latents: dict[str, LatentRequest] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)

    def groups(self, pictures: Sequence[Picture], plan: bucket_planning.BucketPlan) -> tuple[tuple[Item, ...], ...]:
        """Items by bucket, repeats included, in the order of their content, so that renaming a file changes nothing."""
        groups: dict[int, list[Item]] = {}
        for picture, bucket in sorted(
            zip(pictures, plan.assignment.tolist(), strict=True), key=lambda pair: (pair[0].digest, pair[0].name)
        ):
            height, width = plan.shapes[bucket].tolist()
            groups.setdefault(bucket, []).extend([self.item(picture, (height, width))] * picture.repeats)
        return tuple(tuple(group) for _, group in sorted(groups.items()))

    def item(self, picture: Picture, target_hw: tuple[int, int]) -> Item:
        section = self.config.crop
        crops = views(picture.digest, picture.size_hw, target_hw, mode=section.mode, variants=section.variants, flip=section.flip_prob > 0)
        captions = renderings(self.config, picture)
        return Item(picture.name, tuple(self.view(picture, crop) for crop in crops), tuple(map(self.text_key, captions)))

    def view(self, picture: Picture, crop: Crop) -> View:
        key = latent_key(
            picture.digest, crop, alpha_color=self.config.data.alpha_color, encoder_digest=self.encoder_digests["vae"],
            precision=self.config.cache.vae_precision, dtype=self.config.cache.latent_dtype,
        )  # fmt: skip
        self.latents[key] = LatentRequest(key, picture.path, picture.digest, crop)
        return View(key, crop.time_ids)

    def text_key(self, caption: str) -> str:
        key = text_key(caption, encoder_digest=self.encoder_digests["text_encoders"], dtype=self.config.cache.text_dtype)
        self.captions[key] = caption
        return key


def find_pictures(config: Config, quarantine: Mapping[str, str]) -> Manifest:
    """Scans the sources. Raises DataError when too many pictures are bad or have no caption."""
    sources = [Source(source.folder, source.caption_extension, source.repeats) for source in config.data.sources]
    manifest = scan(sources, max_pixels=config.data.max_pixels, quarantine=quarantine)
    check_limits(manifest, max_bad_share=config.data.max_bad_share, max_uncaptioned_share=config.data.max_uncaptioned_share)
    return manifest


def prepare(config: Config, base: BaseModel, *, say: Say) -> Prepared:
    """Finds, plans and encodes. A picture that turns out to be undecodable is quarantined, and the plan made anew.

    Raises DataError when too many pictures cannot be used, StorageError when the cache cannot be written.
    """
    latents, texts = ShardStore(config.cache.folder / "latents"), ShardStore(config.cache.folder / "texts")
    for store in (latents, texts):
        for shard, reason in store.discarded.items():
            say(f"warning: the cache file {shard} was damaged and is made again ({reason})")
    quarantine = read_quarantine(config.cache.folder)
    digests = {"vae": base.digest("vae"), "text_encoders": base.digest("text_encoders")}
    while True:
        manifest = find_pictures(config, quarantine)
        layout = lay_out(config, manifest, digests)
        failures = encode_missing(config, base, layout, latents, texts, say=say)
        if not failures:
            break
        for digest, reason in failures.items():
            say(f"quarantined: {', '.join(p.name for p in manifest.pictures if p.digest == digest)} ({reason})")
        quarantine = {**quarantine, **failures}
        lasting = {digest: reason for digest, reason in quarantine.items() if reason not in (FILE_CHANGED, NOT_FINITE)}
        write_json(config.cache.folder / "quarantine.json", lasting)
    return Prepared(
        manifest, layout.bucket_rows, layout.train, layout.held_out, latents, texts, layout.text_keys, plan_digest(config, layout)
    )


def read_quarantine(folder: Path) -> dict[str, str]:
    """Contents that could not be decoded earlier: digest of the bytes -> reason. A changed file has another digest."""
    path = folder / "quarantine.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def lay_out(config: Config, manifest: Manifest, encoder_digests: Mapping[str, str]) -> _Layout:
    """Decides bucket, crops and caption renderings of every picture. Nothing is read or written."""
    measures = config.validation.every is not None
    share = config.validation.share if measures else 0.0
    train, held_out = split(manifest, share=share, max_pictures=config.validation.max_pictures)
    if not train:
        raise DataError("there is no picture to train on", hint="add pictures to the folders in data.sources")
    plan, rows = plan_buckets(config, train)
    wanted = _Wanted(config, encoder_digests)
    by_content = sorted(train, key=lambda picture: picture.digest)
    measured = held_out or tuple(by_content[: config.validation.max_pictures if measures else 0])
    once = tuple(replace(picture, repeats=1) for picture in measured)
    measured_plan = bucket_planning.BucketPlan(plan.shapes, bucket_planning.assign(sizes_of(once), plan.shapes, **bucket_cost(config)))
    prompts = {"", *config.samples.prompts, *([config.samples.negative_prompt] if config.samples.negative_prompt is not None else [])}
    text_keys = {prompt: wanted.text_key(prompt) for prompt in sorted(prompts)}
    return _Layout(plan, rows, wanted.groups(train, plan), wanted.groups(once, measured_plan), wanted, text_keys)


def plan_buckets(config: Config, pictures: Sequence[Picture]) -> tuple[bucket_planning.BucketPlan, tuple[bucket_planning.BucketRow, ...]]:
    """The buckets of the training pictures, each with at least one batch in it, and the report on them."""
    section = config.buckets
    limits = {"min_side": section.min_side, "max_side": section.max_side, "max_aspect": section.max_aspect}
    shapes = bucket_planning.candidates(resolution=section.resolution, step=section.step, **limits)
    sizes, repeats = sizes_of(pictures), np.array([picture.repeats for picture in pictures])
    plan = bucket_planning.plan(sizes, repeats, shapes, min_count=config.training.batch_size, **bucket_cost(config))
    return plan, bucket_planning.report(plan, sizes, repeats)


def bucket_cost(config: Config) -> dict[str, float]:
    return {"area_weight": config.buckets.area_weight, "upscale_weight": config.buckets.upscale_weight}


def sizes_of(pictures: Sequence[Picture]) -> bucket_planning.Ints:
    return np.array([picture.size_hw for picture in pictures], dtype=np.int64).reshape(-1, 2)


def renderings(config: Config, picture: Picture) -> tuple[str, ...]:
    """The captions that a picture is trained with."""
    section = config.captions
    return caption_variants(
        picture.caption or "", picture.digest, count=section.variants, style=section.style, separator=section.separator,
        shuffle=section.shuffle, keep_first=section.keep_first, tag_drop_prob=section.tag_drop_prob,
    )  # fmt: skip


def plan_digest(config: Config, layout: _Layout) -> str:
    """A digest of everything that decides what batch `k` holds."""
    content = {
        "shapes": layout.plan.shapes.tolist(),
        "items": [[(item.views, item.text_keys) for item in group] for group in layout.train],
        "seed": config.run.seed,
        "batch": [config.training.batch_size, config.training.accumulation_steps],
        "draws": [config.crop.flip_prob, config.captions.dropout_prob, config.captions.dropout_zeros_share],
    }
    return hashlib.sha256(json.dumps(content, default=lambda view: [view.latent_key, view.time_ids]).encode()).hexdigest()


def encode_missing(config: Config, base: BaseModel, layout: _Layout, latents: ShardStore, texts: ShardStore, *, say: Say) -> dict[str, str]:
    """Encodes what is not cached yet and returns the pictures that could not be: digest -> reason.

    The encoders are loaded only if something is missing, one after the other, and released before returning.
    """
    device = choose_device(config.training.device)
    packing = {"batch_size": config.cache.batch_size, "shard_entries": config.cache.shard_entries}
    missing_captions = [caption for key, caption in layout.wanted.captions.items() if key not in texts]
    if missing_captions:
        with track("encoding captions", len(missing_captions)) as on_progress:
            failed = build_texts(
                texts, missing_captions, base.caption_encoder(device), dtype=config.cache.text_dtype, on_progress=on_progress, **packing
            )
        for caption, reason in failed.items():
            raise DataError(f"the caption {caption!r} cannot be encoded: {reason}", hint="the text encoders in model.base may be damaged")
    missing = [request for key, request in layout.wanted.latents.items() if key not in latents]
    if not missing:
        return {}
    with track("encoding pictures", len(missing)) as on_progress:
        return build_latents(
            latents, missing, base.vae_encoder(device, config.cache.vae_precision), alpha_color=config.data.alpha_color,
            max_pixels=config.data.max_pixels, dtype=config.cache.latent_dtype, on_progress=on_progress, **packing,
        )  # fmt: skip
