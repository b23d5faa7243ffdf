"""The options of sd-scripts about buckets, crops and captions, which are settings of the whole run here.

There, they belong to a subset or dataset. Where these differ, the value that most have is taken, and the others are named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from aquatint.config.importers.sd_scripts_notes import WITHOUT_EFFECT, Draft, Place, Written, written_in

_UNET_STEP = 32
_RESOLUTION = 1024  # ours, if it is not set
_CROP_VARIANTS = 4  # random crops that are cached of each picture
_MAX_HELD_OUT = 0.5


def set_run(draft: Draft, places: Sequence[Place]) -> None:
    """Sets what there is to set, and notes what became of the options."""
    for part in (_buckets, _crops, _captions, _rest):
        part(draft, places)


def _side(size: Any) -> int:
    """The side of the square of the same area."""
    width, height = size if isinstance(size, list) else (size, size)
    return max(_UNET_STEP, round(math.sqrt(max(0, width) * max(0, height))))


def _buckets(draft: Draft, places: Sequence[Place]) -> None:
    sizes = written_in(places, "resolution")
    sides = sorted({_side(one.value) for one in sizes}, reverse=True)
    if sides:
        draft.set("buckets.resolution", sides[0], "resolution")
    if sides[1:]:
        draft.set("buckets.tiers", sides[1:], "resolution of the other datasets")
    for one in sizes:
        side = _side(one.value)
        name = "buckets.resolution" if side == sides[0] else "buckets.tiers"
        draft.note(one, "mapped", f"{name} = {side}")
        if isinstance(one.value, list) and one.value[0] != one.value[1]:
            draft.note(one, "approximated", f"{name} = {side}, the square of that area")
        if sides[1:]:
            draft.note(one, "approximated", f"{name}: each picture is trained at one size here, the largest that it has the pixels for")
    if not sizes:
        draft.note_unset("resolution", "it stands on the command line of sd-scripts; here buckets.resolution is 1024, if it is not set")
    is_enabled = draft.settle(places, "enable_bucket", "", None)
    limits = written_in(places, "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
    if is_enabled or (is_enabled is None and limits):
        _kohya_buckets(draft, places)
    elif is_enabled is False:
        _one_bucket(draft, places, sides[0] if sides else _RESOLUTION)
    else:
        if sides and sides[0] != _RESOLUTION:
            draft.set("buckets.min_side", max(_UNET_STEP, sides[0] // 2 // _UNET_STEP * _UNET_STEP), "half of the resolution")
            draft.set("buckets.max_side", max(_UNET_STEP, sides[0] * 2), "twice the resolution")
        text = "sd-scripts crops every picture to one shape, unless its command line has --enable_bucket; here the buckets are our own"
        draft.note_unset("enable_bucket", text)


def _kohya_buckets(draft: Draft, places: Sequence[Place]) -> None:
    draft.set("buckets.set", "kohya", "enable_bucket")
    for one in written_in(places, "enable_bucket"):
        draft.note(one, "mapped", 'buckets.set = "kohya"')
    for name, key, default in (("min_bucket_reso", "min_side", 256), ("max_bucket_reso", "max_side", 1024)):
        value = draft.settle(places, name, "", default)
        side = max(_UNET_STEP, value)
        draft.set(f"buckets.{key}", side, name if written_in(places, name) else f"the default of {name}")
        _note_number(draft, written_in(places, name), value, f"buckets.{key}", side)
    step = draft.settle(places, "bucket_reso_steps", "", 64)
    fitting = max(1, -(-step // _UNET_STEP)) * _UNET_STEP
    written = written_in(places, "bucket_reso_steps")
    draft.set("buckets.step", fitting, "bucket_reso_steps" if written else "the default of bucket_reso_steps")
    _note_number(draft, written, step, "buckets.step", fitting)


def _note_number(draft: Draft, written: Sequence[Written], winner: int, key: str, value: int) -> None:
    for one in written:
        if one.value == winner:
            is_same = value == winner
            text = f"{key} = {value}" if is_same else f"{key} = {value}: SDXL needs a multiple of {_UNET_STEP}, and no less"
            draft.note(one, "mapped" if is_same else "approximated", text)


def _one_bucket(draft: Draft, places: Sequence[Place], resolution: int) -> None:
    side = max(_UNET_STEP, resolution // _UNET_STEP * _UNET_STEP)
    for key, value in (("min_side", side), ("max_side", side), ("max_aspect", 1.0)):
        draft.set(f"buckets.{key}", value, "enable_bucket = false")
    for one in written_in(places, "enable_bucket"):
        draft.note(one, "mapped", "one square for all pictures: min_side, max_side and max_aspect of [buckets]")
    for one in written_in(places, "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"):
        draft.note(one, "mapped", f"{WITHOUT_EFFECT} where enable_bucket is false, in sd-scripts too")


def _crops(draft: Draft, places: Sequence[Place]) -> None:
    draft.settle(places, "flip_aug", "crop.flip_prob", False, lambda value: 0.5 if value else 0.0)
    is_random = draft.settle(places, "random_crop", "crop.mode", False, lambda value: "random" if value else "center")
    if is_random:
        draft.set("crop.variants", _CROP_VARIANTS, "random_crop")
        text = f'crop.mode = "random", and crop.variants = {_CROP_VARIANTS}: so many random crops of each picture are cached'
        for one in written_in(places, "random_crop"):
            draft.note(one, "approximated", text)


def _captions(draft: Draft, places: Sequence[Place]) -> None:
    shuffle = draft.settle(places, "shuffle_caption", "", False)
    drop = draft.settle(places, "caption_tag_dropout_rate", "", 0)
    if shuffle or drop:
        _tags(draft, places)
    else:
        for one in written_in(places, "shuffle_caption", "caption_tag_dropout_rate"):
            draft.note(one, "mapped", "captions are used as they are written")
        for one in written_in(places, "keep_tokens", "keep_tokens_separator", "caption_separator"):
            draft.note(one, "mapped", f"{WITHOUT_EFFECT} where tags are neither shuffled nor dropped, in sd-scripts too")
    if draft.settle(places, "enable_wildcard", "captions.wildcards", False):
        for one in written_in(places, "enable_wildcard"):
            draft.note(one, "approximated", "captions.wildcards, and lines are alternatives; a plain brace is written \\{ here, and not {{")
    elif not written_in(places, "enable_wildcard"):
        draft.note_unset("enable_wildcard", "of a caption of several lines, sd-scripts uses the first only; here all are one caption")
    prob = _settle_share(draft, places, "caption_dropout_rate", "captions.dropout_prob")
    if not written_in(places, "caption_dropout_rate"):
        text = "sd-scripts drops no captions, if its command line does not say so; here captions.dropout_prob is 0.1, which guidance needs"
        draft.note_unset("caption_dropout_rate", text)
    elif prob > 0:
        draft.set("captions.dropout_zeros_share", 0.0, "sd-scripts encodes the empty text")


def _tags(draft: Draft, places: Sequence[Place]) -> None:
    draft.set("captions.style", "tags", "shuffle_caption or caption_tag_dropout_rate")
    draft.settle(places, "caption_separator", "captions.separator", ",")
    draft.settle(places, "shuffle_caption", "captions.shuffle", False)
    mark = draft.settle(places, "keep_tokens_separator", "captions.keep_separator", "")
    if mark:
        for one in written_in(places, "keep_tokens"):
            draft.note(one, "approximated", "only keep_tokens_separator counts here, also in captions without the mark")
    else:
        draft.settle(places, "keep_tokens", "captions.keep_first", 0, lambda value: max(0, value))
        draft.set("captions.keep_first", draft.values["captions"].get("keep_first", 0), "keep_tokens")
    _settle_share(draft, places, "caption_tag_dropout_rate", "captions.tag_drop_prob")


def _rest(draft: Draft, places: Sequence[Place]) -> None:
    sizes = [one for one in written_in(places, "batch_size") if one.value > 0]
    if sizes:
        smallest = min(one.value for one in sizes)
        draft.set("training.batch_size", smallest, "batch_size")
        for one in sizes:
            is_same = one.value == smallest
            text = f"training.batch_size = {smallest}" if is_same else f"one for all sources here: {smallest}, the smallest"
            draft.note(one, "mapped" if is_same else "approximated", text)
    _settle_share(draft, places, "validation_split", "validation.share", _MAX_HELD_OUT)
    for one in written_in(places, "prior_loss_weight"):
        draft.note(one, "mapped", f"{WITHOUT_EFFECT}: it is 1, or there are no regularization pictures")


def _settle_share(draft: Draft, places: Sequence[Place], name: str, key: str, most: float = 1.0) -> float:
    """A share, between 0 and `most`."""

    def limited(value: float) -> float:
        return min(most, max(0.0, float(value)))

    winner = float(draft.settle(places, name, key, 0, limited))
    for one in written_in(places, name):
        if one.value == winner != limited(winner):
            draft.note(one, "approximated", f"{key} = {limited(winner)}: it can be from 0 to {most:g}")
    return limited(winner)
