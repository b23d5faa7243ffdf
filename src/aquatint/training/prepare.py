"""From the config's folders to everything the loader needs: pictures found, shapes planned, latents and texts encoded.

This module and `build` are the composition root: the only ones that hand the config's values to the rooms below.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aquatint.config.schema import Config
from aquatint.data import buckets as bucket_planning
from aquatint.data.batch import Item, View
from aquatint.data.cache import LatentRequest, build_latents, build_texts, latent_key, text_key
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
    plan: bucket_planning.BucketPlan
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
    """What has to be in the cache, before anything is encoded."""

    plan: bucket_planning.BucketPlan
    train: tuple[tuple[Item, ...], ...]
    held_out: tuple[tuple[Item, ...], ...]
    latent_requests: Mapping[str, LatentRequest]
    captions: Mapping[str, str]
    text_keys: Mapping[str, str]


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
        write_json(config.cache.folder / "quarantine.json", quarantine)
    return Prepared(manifest, layout.plan, layout.train, layout.held_out, latents, texts, layout.text_keys, plan_digest(config, layout))


def read_quarantine(folder: Path) -> dict[str, str]:
    """Contents that could not be decoded earlier: digest of the bytes -> reason. A changed file has another digest."""
    path = folder / "quarantine.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def lay_out(config: Config, manifest: Manifest, digests: Mapping[str, str]) -> _Layout:
    """Decides bucket, crops and caption renderings of every picture. Nothing is read or written."""
    train, held_out = split(manifest, share=config.validation.share, max_pictures=config.validation.max_pictures)
    if not train:
        raise DataError("there is no picture to train on", hint="add pictures to the folders in data.sources")
    section = config.buckets
    shapes = bucket_planning.candidates(
        resolution=section.resolution, step=section.step, min_side=section.min_side, max_side=section.max_side, max_aspect=section.max_aspect
    )  # fmt: skip
    cost = {"area_weight": section.area_weight, "upscale_weight": section.upscale_weight}
    sizes = np.array([picture.size_hw for picture in train])
    repeats = np.array([picture.repeats for picture in train])
    plan = bucket_planning.plan(sizes, repeats, shapes, min_count=config.training.batch_size, **cost)
    requests: dict[str, LatentRequest] = {}
    captions: dict[str, str] = {}

    def item_of(picture: Picture, target_hw: tuple[int, int]) -> Item:
        crops = views(picture.digest, picture.size_hw, target_hw, mode=config.crop.mode, variants=config.crop.variants, flip=config.crop.flip_prob > 0)  # fmt: skip
        return Item(
            name=picture.name,
            views=tuple(_request_view(config, picture, crop, digests["vae"], requests) for crop in crops),
            text_keys=tuple(_request_text(config, caption, digests["text_encoders"], captions) for caption in renderings(config, picture)),
        )

    groups: dict[int, list[tuple[str, Item]]] = {}
    for picture, bucket in zip(train, plan.assignment, strict=True):
        item = item_of(picture, (int(plan.shapes[bucket][0]), int(plan.shapes[bucket][1])))
        groups.setdefault(int(bucket), []).extend([(picture.digest, item)] * picture.repeats)
    measured = held_out or tuple(sorted(train, key=lambda picture: picture.digest))[: config.validation.max_pictures]
    measured_in = bucket_planning.assign(np.array([picture.size_hw for picture in measured]), plan.shapes, **cost)
    measured_groups: dict[int, list[tuple[str, Item]]] = {}
    for picture, bucket in zip(measured, measured_in, strict=True):
        item = item_of(picture, (int(plan.shapes[bucket][0]), int(plan.shapes[bucket][1])))
        measured_groups.setdefault(int(bucket), []).append((picture.digest, item))
    prompts = {"", *config.samples.prompts, *([config.samples.negative_prompt] if config.samples.negative_prompt is not None else [])}
    text_keys = {prompt: _request_text(config, prompt, digests["text_encoders"], captions) for prompt in sorted(prompts)}
    return _Layout(plan, _in_order(groups), _in_order(measured_groups), requests, captions, text_keys)


def _in_order(groups: Mapping[int, Sequence[tuple[str, Item]]]) -> tuple[tuple[Item, ...], ...]:
    """Groups by bucket, pictures by content, so that renaming a file changes nothing."""
    return tuple(tuple(item for _, item in sorted(group, key=lambda pair: (pair[0], pair[1].name))) for _, group in sorted(groups.items()))


def renderings(config: Config, picture: Picture) -> tuple[str, ...]:
    """The captions that a picture is trained with."""
    section = config.captions
    return caption_variants(
        picture.caption or "", picture.digest, count=section.variants, style=section.style, separator=section.separator,
        shuffle=section.shuffle, keep_first=section.keep_first, tag_drop_prob=section.tag_drop_prob,
    )  # fmt: skip


def _request_view(config: Config, picture: Picture, crop: Crop, encoder_digest: str, requests: dict[str, LatentRequest]) -> View:
    key = latent_key(
        picture.digest, crop, alpha_color=config.data.alpha_color, encoder_digest=encoder_digest,
        precision=config.cache.vae_precision, dtype=config.cache.latent_dtype,
    )  # fmt: skip
    requests[key] = LatentRequest(key, picture.path, picture.digest, crop)
    return View(key, crop.time_ids)


def _request_text(config: Config, caption: str, encoder_digest: str, captions: dict[str, str]) -> str:
    key = text_key(caption, encoder_digest=encoder_digest, dtype=config.cache.text_dtype)
    captions[key] = caption
    return key


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
    missing_captions = [caption for key, caption in layout.captions.items() if key not in texts]
    if missing_captions:
        with track("encoding captions", len(missing_captions)) as on_progress:
            failed = build_texts(
                texts, missing_captions, base.caption_encoder(device), dtype=config.cache.text_dtype, on_progress=on_progress, **packing
            )
        for caption, reason in failed.items():
            raise DataError(f"the caption {caption!r} cannot be encoded: {reason}", hint="the text encoders in model.base may be damaged")
    missing = [request for key, request in layout.latent_requests.items() if key not in latents]
    if not missing:
        return {}
    with track("encoding pictures", len(missing)) as on_progress:
        return build_latents(
            latents, missing, base.vae_encoder(device, config.cache.vae_precision), alpha_color=config.data.alpha_color,
            max_pixels=config.data.max_pixels, dtype=config.cache.latent_dtype, on_progress=on_progress, **packing,
        )  # fmt: skip
