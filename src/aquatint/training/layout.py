"""Which picture goes where in which form: buckets, crops and captions of every picture, as columns. Nothing is read or written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from aquatint.config.check import renders_online
from aquatint.config.schema import Config
from aquatint.data import buckets as bucketing
from aquatint.data import crop as cropping
from aquatint.data.cache import LatentRequest, MaskRequest, latent_keys, latent_recipe, mask_keys, mask_recipe, text_keys, text_recipe
from aquatint.data.captions import CaptionPolicy, weighted_variants
from aquatint.data.index import take
from aquatint.data.manifest import Manifest, Picture, by_content, split
from aquatint.data.sampler import Group
from aquatint.data.samples import Keys, Ragged, Samples, Words, by_bucket
from aquatint.data.tags import IGNORED, TagTable, drop_probs, picture_weights, read_tags
from aquatint.errors import DataError
from aquatint.planning.shapes import sets_of
from aquatint.planning.sources import repeats_of
from aquatint.training.find import policies_of

Rows = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Recipes:
    """What decides entries of the cache beside the picture or caption: see `cache.latent_recipe` and its like."""

    latents: bytes
    texts: bytes
    alphas: bytes
    masks: bytes


def recipes_of(config: Config, encoder_digests: Mapping[str, str]) -> Recipes:
    """The recipes of a config with encoders of these digests: `vae` and `text_encoders`."""
    section = config.cache
    return Recipes(
        latent_recipe(
            alpha_color=config.data.alpha_color, encoder_digest=encoder_digests["vae"], precision=section.vae_precision,
            dtype=section.latent_dtype,
        ),
        text_recipe(encoder_digest=encoder_digests["text_encoders"], dtype=section.text_dtype),
        mask_recipe("alpha"),
        mask_recipe("file"),
    )  # fmt: skip


@dataclass(frozen=True)
class Side:
    """One side of the data, trained or measured: row `i` of `samples` is row `rows[i]` of the manifest, cut as in `crops[i]`.

    `reductions` say how many times smaller the picture is decoded for that.
    """

    samples: Samples
    rows: Rows
    crops: Int32s  # (n, V, 9)
    reductions: Int32s  # (n, V)
    texts: tuple[str, ...]  # of `samples.text_keys`


@dataclass(frozen=True)
class Layout:
    """All of the run's samples. `groups` are what `sampler.Order` counts; `policies` and `drop_probs` render captions.

    `known` are some of the trained pictures, measured beside those held out; none where nothing is held out.
    """

    manifest: Manifest
    plan: bucketing.BucketPlan
    report: tuple[bucketing.BucketRow, ...]
    groups: tuple[tuple[Group, ...], ...]
    repeats: tuple[Fraction, ...]
    train: Side
    held_out: Side
    held_out_is_trained: bool
    known: Side
    prompts: Mapping[str, bytes]
    policies: tuple[CaptionPolicy, ...]
    drop_probs: dict[str, float] | None
    tags: TagTable | None


def lay_out(config: Config, manifest: Manifest, recipes: Recipes, focus: Mapping[bytes, tuple[float, float]] | None = None) -> Layout:
    """Decides everything about every picture. Raises DataError if none is left to train on.

    Pictures that no bucket suits are moved to the rejected ones. `focus` has the points (down, right) that crops are to be
    centred on, by digest.
    """
    train_rows, held_rows = _split(config, manifest)
    if not len(train_rows):
        why = "".join(f": {one.name} {one.reason}" for one in manifest.rejected[-1:])
        raise DataError(f"there is no picture to train on{why}", hint="add pictures to data.sources, or change what leaves these out")
    repeats = repeats_of(config, np.bincount(manifest.source_of[train_rows], minlength=len(manifest.sources)).tolist())
    times = np.array([float(value) for value in repeats])[manifest.source_of[train_rows]]
    plan = plan_buckets(config, manifest.sizes_hw[train_rows], times)
    if plan.skipped:
        reasons = {int(train_rows[row]): reason for row, reason in plan.skipped.items()}
        return lay_out(config, manifest.without(reasons, bad=False), recipes, focus)
    policies = policies_of(config)
    tags = _read_tags(config, manifest, train_rows)
    probs = drop_probs(tags, config.captions.tag_drop_prob) if tags is not None and config.captions.tag_drop == "weighted" else None
    weights = np.array([source.loss_weight for source in manifest.sources])[manifest.source_of[train_rows]]
    if tags is not None and config.captions.tag_weights.enabled:
        section = config.captions.tag_weights
        weights = weights * picture_weights(
            tags, times, power=section.power, lowest=section.lowest, highest=section.highest, ignore=(*IGNORED, *section.ignore)
        )
    order = by_bucket(plan.assignment, manifest.source_of[train_rows], manifest.digests[train_rows])
    buckets, rows = plan.assignment[order], train_rows[order]
    draft = _Draft(config, manifest, plan.shapes, recipes, focus)
    train = draft.side(rows, buckets, weights[order], policies, probs, varied=True)
    held_out, is_trained = _held_out(config, draft, plan, rows, buckets, held_rows, policies)
    known = _known(config, draft, rows, buckets, policies, 0 if is_trained else config.validation.train_pictures)
    texts = sorted({"", *config.samples.prompts, *([config.samples.negative_prompt] if config.samples.negative_prompt is not None else [])})
    keys = text_keys(texts, recipes.texts)
    settled = tuple(replace(source, repeats=number) for source, number in zip(manifest.sources, repeats, strict=True))
    return Layout(
        manifest=replace(manifest, sources=settled), plan=plan, report=bucketing.report(plan, manifest.sizes_hw[train_rows], times),
        groups=_groups(buckets, manifest.source_of[rows], repeats, len(plan.shapes)), repeats=repeats, train=train, held_out=held_out,
        held_out_is_trained=is_trained, known=known, prompts={text: key.tobytes() for text, key in zip(texts, keys, strict=True)},
        policies=policies, drop_probs=probs, tags=tags,
    )  # fmt: skip


def column(manifest: Manifest, name: str, rows: Rows) -> list[Any]:
    """One column of these rows, as Python values."""
    values: list[Any] = take(manifest.table.select([name]), rows)[name].to_pylist()
    return values


def _split(config: Config, manifest: Manifest) -> tuple[Rows, Rows]:
    measures = config.validation.every is not None
    return split(manifest, share=config.validation.share if measures else 0.0, max_pictures=config.validation.max_pictures)


def plan_buckets(config: Config, sizes_hw: npt.NDArray[np.integer], times: npt.NDArray[np.float64]) -> bucketing.BucketPlan:
    """The buckets of pictures (n, 2) that are shown `times` (n,) times per epoch, with a batch or more in each."""
    section, smallest = config.buckets, config.training.pictures_per_step or config.training.at_once  # the same, whatever the memory
    return bucketing.plan(
        sizes_hw, times, sets_of(config), min_count=smallest, max_upscale=section.max_upscale,
        area_weight=section.area_weight, upscale_weight=section.upscale_weight,
    )  # fmt: skip


def _read_tags(config: Config, manifest: Manifest, rows: Rows) -> TagTable | None:
    """The tags of the first caption of each picture, if anything depends on how frequent they are."""
    section = config.captions
    if section.style != "tags" or not (section.tag_drop == "weighted" or section.tag_weights.enabled):
        return None
    firsts = (captions[0] if captions else "" for captions in column(manifest, "captions", rows))
    return read_tags(firsts, section.separator, keep_separator=section.keep_separator)


def _groups(buckets: Int32s, sources: npt.NDArray[np.int16], repeats: Sequence[Fraction], count: int) -> tuple[tuple[Group, ...], ...]:
    """The groups of each bucket: one per source that has pictures in it."""
    table = np.zeros((count, len(repeats)), dtype=np.int64)
    np.add.at(table, (buckets, sources), 1)
    return tuple(
        tuple(Group(int(size), times) for size, times in zip(sizes, repeats, strict=True) if size) for sizes in table
    )  # fmt: skip


def _held_out(
    config: Config,
    draft: _Draft,
    plan: bucketing.BucketPlan,
    rows: Rows,
    buckets: Int32s,
    held_rows: Rows,
    policies: Sequence[CaptionPolicy],
) -> tuple[Side, bool]:
    """The pictures that are measured: those held out, or else some of the trained ones."""
    if not len(held_rows):
        return _known(config, draft, rows, buckets, policies, config.validation.max_pictures), True
    number = config.validation.max_pictures if config.validation.every is not None else 0
    held_rows = held_rows[by_content(draft.manifest.digests[held_rows])[0][:number]]
    return _plain(draft, held_rows, plan.place(draft.manifest.sizes_hw[held_rows]), policies), False


def _known(config: Config, draft: _Draft, rows: Rows, buckets: Int32s, policies: Sequence[CaptionPolicy], number: int) -> Side:
    """So many of the trained pictures, those of the lowest digests, to be measured; none if nothing is."""
    if config.validation.every is None:
        number = 0
    own = np.flatnonzero(draft.manifest.has_role("train")[rows])
    order, first = by_content(draft.manifest.digests[rows[own]])
    chosen = own[order[first[:number]]]
    return _plain(draft, rows[chosen], buckets[chosen], policies)


def _plain(draft: _Draft, rows: Rows, buckets: Int32s, policies: Sequence[CaptionPolicy]) -> Side:
    """Pictures to be measured: one view and the caption as it is written of each, and all weigh the same."""
    order = by_bucket(buckets, np.zeros(len(rows), np.int16), draft.manifest.digests[rows])
    plain = [replace(policy, shuffle=False, tag_drop_prob=0.0, categories=(), pick="first", variants=1) for policy in policies]
    return draft.side(rows[order], buckets[order], np.ones(len(rows)), plain, None, varied=False)


@dataclass(frozen=True)
class _Draft:
    """What the samples of both sides are made from."""

    config: Config
    manifest: Manifest
    shapes: npt.NDArray[np.int64]
    recipes: Recipes
    focus: Mapping[bytes, tuple[float, float]] | None

    def side(
        self,
        rows: Rows,
        buckets: Int32s,
        weights: npt.NDArray[np.float64],
        policies: Sequence[CaptionPolicy],
        probs: Mapping[str, float] | None,
        *,
        varied: bool,
    ) -> Side:
        """The samples of manifest rows that are ordered by bucket. `varied`: with all crops, flips and renderings."""
        digests, sources = self.manifest.digests[rows], self.manifest.source_of[rows]
        crops = self._crops(digests, self.manifest.sizes_hw[rows], self.shapes[buckets], varied=varied)
        num_views, reductions = crops.shape[1], self._reductions(rows, crops)
        keys = latent_keys(
            np.repeat(digests, num_views, axis=0), crops.reshape(-1, crops.shape[2]), self.recipes.latents, reductions.reshape(-1)
        )
        texts, counts, shares, captions = self._texts(
            rows, digests, sources, policies, probs, online=varied and renders_online(self.config)
        )
        samples = Samples(
            names=Words.of(column(self.manifest, "name", rows)), bucket_starts=np.searchsorted(buckets, np.arange(len(self.shapes) + 1)),
            sources=sources, latent_keys=keys.reshape(-1, num_views, 16), time_ids=cropping.time_ids_of(crops),
            loss_weights=weights.astype(np.float32), text_of=Ragged.of(counts),
            text_keys=text_keys(texts, self.recipes.texts), text_weights=np.array(shares, dtype=np.float32),
            captions=captions, mask_keys=self._mask_keys(rows, crops),
        )  # fmt: skip
        return Side(samples, rows, crops, reductions, texts)

    def _crops(self, digests: Keys, sizes_hw: Int32s, targets_hw: npt.NDArray[np.int64], *, varied: bool) -> Int32s:
        """(n, V, 9): the crops of each picture, each followed by its mirror image if samples are mirrored."""
        section = self.config.crop
        if section.mode == "random" and varied:
            positions = cropping.random_positions(digests, section.variants)
        elif section.mode == "focus":
            points = np.array([(self.focus or {}).get(digest.tobytes(), (0.5, 0.5)) for digest in digests]).reshape(-1, 2)
            positions = cropping.positions_for_focus(sizes_hw, targets_hw, points)[:, None]
        else:
            positions = np.full((len(digests), 1, 2), 0.5)
        return cropping.fit_all(sizes_hw, targets_hw, positions, flip=varied and section.flip_prob > 0)

    def _reductions(self, rows: Rows, crops: Int32s) -> Int32s:
        """(n, V): 1 for what is decoded whole."""
        if self.config.data.decode == "whole":
            return np.ones(crops.shape[:2], dtype=np.int32)
        return np.where(self.manifest.is_reducible[rows][:, None], cropping.reductions_of(crops), 1).astype(np.int32)

    def _texts(
        self,
        rows: Rows,
        digests: Keys,
        sources: npt.NDArray[np.int16],
        policies: Sequence[CaptionPolicy],
        probs: Mapping[str, float] | None,
        *,
        online: bool,
    ) -> tuple[tuple[str, ...], list[int], list[float], Words | None]:
        """The texts to be cached, how many each row has, the shares they are drawn with; or, online, the captions as written."""
        if not online and (plain := self._plain_texts(rows, sources, policies)) is not None:
            return plain, [1] * len(plain), [1.0] * len(plain), None
        written = column(self.manifest, "captions", rows)
        if online:
            listed = [captions or [""] for captions in written]
            counts = list(map(len, listed))
            return (), counts, [1 / count for count in counts for _ in range(count)], Words.of(text for texts in listed for text in texts)
        raw = digests.tobytes()
        texts: list[str] = []
        counts, shares = [], []
        for place, (captions, source) in enumerate(zip(written, sources.tolist(), strict=True)):
            found = weighted_variants(captions, raw[16 * place : 16 * place + 16], policies[source], drop_probs=probs)
            texts += found
            shares += found.values()
            counts.append(len(found))
        return tuple(texts), counts, shares, None

    def _plain_texts(self, rows: Rows, sources: npt.NDArray[np.int16], policies: Sequence[CaptionPolicy]) -> tuple[str, ...] | None:
        """The captions as they are written, if each picture has one and nothing is done to it: a million in a second."""
        if not all(policies[source].leaves_as_written for source in np.unique(sources)):
            return None
        captions = take(self.manifest.table.select(["captions"]), rows)["captions"].combine_chunks()
        lengths = np.diff(captions.offsets.to_numpy()) if len(rows) else np.ones(0)
        return tuple(text.strip() for text in captions.flatten().to_pylist()) if (lengths == 1).all() else None

    def _mask_keys(self, rows: Rows, crops: Int32s) -> Keys | None:
        """(n, V, 16), zeros where a picture has no mask; None if none has."""
        digests = self.manifest.mask_digests[rows]
        masked = digests.any(axis=1)
        if not masked.any():
            return None
        keys = np.zeros((*crops.shape[:2], 16), dtype=np.uint8)
        is_alpha = np.array([source.masks == "alpha" for source in self.manifest.sources])[self.manifest.source_of[rows]]
        for chosen, recipe in ((masked & is_alpha, self.recipes.alphas), (masked & ~is_alpha, self.recipes.masks)):
            repeated = np.repeat(digests[chosen], crops.shape[1], axis=0)
            keys[chosen] = mask_keys(repeated, crops[chosen].reshape(-1, crops.shape[2]), recipe).reshape(-1, crops.shape[1], 16)
        return keys


# What has to be in the cache


def latent_requests(manifest: Manifest, side: Side, missing: npt.NDArray[np.bool_]) -> Iterator[LatentRequest]:
    """A request for each view (n, V) that is missing; in the order of the files, views of one picture beside each other."""
    for place, picture in _incomplete(manifest, side, missing):
        for view in np.flatnonzero(missing[place]):
            crop = cropping.Crop.from_row(side.crops[place, view])
            key, reduction = side.samples.latent_key(place, view), int(side.reductions[place, view])
            yield LatentRequest(key, picture.place, picture.digest, crop, reduction)


def mask_requests(manifest: Manifest, side: Side, missing: npt.NDArray[np.bool_]) -> Iterator[MaskRequest]:
    """The same for masks."""
    for place, picture in _incomplete(manifest, side, missing):
        kind: Literal["alpha", "file"] = "alpha" if manifest.sources[picture.source].masks == "alpha" else "file"
        for view in np.flatnonzero(missing[place]):
            key = side.samples.mask_key(place, view)
            if picture.mask is not None and key is not None:
                yield MaskRequest(key, picture.mask, picture.mask_digest, cropping.Crop.from_row(side.crops[place, view]), kind)


def _incomplete(manifest: Manifest, side: Side, missing: npt.NDArray[np.bool_]) -> Iterator[tuple[int, Picture]]:
    """The rows with something missing, and their pictures, in the order of the manifest."""
    order = np.argsort(side.rows, kind="stable")
    places = order[missing[order].any(axis=1)]
    yield from zip(places.tolist(), manifest.pictures(side.rows[places]), strict=True)


def plan_digest(config: Config, layout: Layout) -> str:
    """A digest of everything that decides what batch `k` holds. Texts that are cached are known by their keys; for others, it takes
    the captions, how each is rendered, and by which text encoders, for which the key of the empty text stands.
    """
    samples = layout.train.samples
    used, policy_of = np.unique(samples.sources, return_inverse=True)
    text = {
        "shapes": layout.plan.shapes.tolist(),
        "groups": [[(group.count, str(group.repeats)) for group in groups] for groups in layout.groups],
        "seed": config.run.seed,
        "batch": [config.training.batch_size, config.training.accumulation_steps],
        "draws": [config.crop.flip_prob, config.captions.dropout_prob, config.captions.dropout_zeros_share, config.data.mask_floor],
        "policies": [repr(layout.policies[source]) for source in used] if samples.captions is not None else [],
    }
    digest = hashlib.sha256(json.dumps(text).encode())
    columns = [samples.latent_keys, samples.time_ids, samples.loss_weights, samples.text_of.starts, samples.text_keys, samples.text_weights]
    if samples.mask_keys is not None:
        columns.append(samples.mask_keys)
    if samples.captions is not None:
        texts = np.frombuffer(samples.captions.data + layout.prompts[""], np.uint8)
        columns += [policy_of.astype(np.int16), samples.captions.starts, texts]
    for column in columns:
        digest.update(np.ascontiguousarray(column))
    return digest.hexdigest()
