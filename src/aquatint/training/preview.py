"""What will be trained, to look at: the page of `aquatint data preview` and the table of `aquatint data buckets`. Nothing is encoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from aquatint.config.check import renders_online
from aquatint.config.schema import Config
from aquatint.data import crop as cropping
from aquatint.data.bucket_plot import plot_buckets
from aquatint.data.buckets import fit_loss, merged, merged_text, report_text, small_buckets
from aquatint.data.captions import caption_report, render
from aquatint.data.downloads import public_name
from aquatint.data.image import BadImage, Decoded, Pixels, decode_image, encode_webp, load_alpha, load_mask, quiet_decoders, resize
from aquatint.data.inspection import BLURRED_BELOW, FLAT_BELOW, contrast, fingerprint, near_duplicates, sharpness
from aquatint.data.ledger import ledger_text
from aquatint.data.manifest import Manifest, Picture
from aquatint.data.places import Opener
from aquatint.data.samples import Samples
from aquatint.data.tags import count_tags, frequency_text
from aquatint.errors import StorageError
from aquatint.models.sdxl.tokenizer import chunk, chunk_report, token_text
from aquatint.storage import write_bytes, write_text
from aquatint.training.find import find_pictures, opener_of, read_quarantine
from aquatint.training.focus_points import focus_points
from aquatint.training.layout import Layout, column, lay_out, recipes_of
from aquatint.training.preview_page import Caption, Listed, PreviewRow, Summary, page
from aquatint.utils.progress import track
from aquatint.utils.seeds import generator

THUMBNAIL_PX, CROP_PX = 400, 640
RENDERINGS = 64  # of a caption that is rendered anew at every step: the most frequent of so many are shown
SHOWN_TEXTS = 4
MUCH_ENLARGED = 1.5
MIME = "image/webp"


@dataclass(frozen=True)
class Look:
    """What one decoded picture looks like, and a thumbnail of it."""

    sharpness: float
    contrast: float
    fingerprint: int
    thumbnail: bytes


def planned(config: Config) -> Layout:
    """Finds the pictures and lays them out as a run would, without any model."""
    opener = opener_of(config)
    manifest = find_pictures(config, opener, read_quarantine(config.cache.folder))
    return lay_out(config, manifest, recipes_of(config, {"vae": "", "text_encoders": ""}), focus_points(config, manifest, opener))


def buckets_run(config: Config, plot: Path | None) -> str:
    """The table of buckets, with the names of what lies in small ones; writes a plot if a path is given."""
    layout = planned(config)
    if plot is not None:
        write_bytes(plot, plot_png(layout))
    names = [layout.train.samples.names[row] for row in range(len(layout.train.rows))]
    found = column(layout.manifest, "name", np.sort(layout.train.rows))
    parts = [
        report_text(layout.report),
        small_buckets(layout.report, layout.train.samples.bucket_starts, names),
        merged_text(merged(layout.plan, layout.manifest.sizes_hw[np.sort(layout.train.rows)]), found),
    ]
    return "\n\n".join(part for part in parts if part)


def plot_png(layout: Layout) -> bytes:
    """How full the buckets are, and what is cropped and enlarged."""
    sizes, targets = _sizes(layout)
    cropped, scale = fit_loss(sizes, targets)
    return plot_buckets(layout.report, cropped, scale)


def _sizes(layout: Layout) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    crops = layout.train.crops[:, 0].astype(np.int64)
    return crops[:, 0:2], crops[:, 6:8]


def preview_run(config: Config, output: Path, *, num_pictures: int = 24, num_inspected: int = 2000) -> Path:
    """Writes the page and returns its path. Raises AquatintError."""
    layout, opener = planned(config), opener_of(config)
    rows = spread(len(layout.train.rows), num_pictures)
    with track("drawing the preview", len(rows)) as on_progress, quiet_decoders():
        cards = []
        for done, row in enumerate(rows, start=1):
            cards += card(config, layout, row, opener)
            on_progress(done, len(rows))
    inspected = spread(len(layout.manifest), num_inspected)
    looks = look_at_all(config, layout.manifest, inspected, opener)
    write_text(output, page(cards, summary(config, layout, looks)))
    return output


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers below `count`, evenly spread."""
    return sorted({index * count // wanted for index in range(wanted)}) if count > wanted else list(range(count))


# One picture


def card(config: Config, layout: Layout, row: int, opener: Opener) -> Iterator[PreviewRow]:
    """The picture of a row of the training samples; nothing if it cannot be decoded, which the caching would say too."""
    samples, manifest = layout.train.samples, layout.manifest
    picture = manifest.picture(int(layout.train.rows[row]))
    decoded = decode(config, picture, opener)
    if decoded is None:
        return
    crop = cropping.Crop.from_row(layout.train.crops[row, view_of(config, samples, row)])
    mask, trouble = mask_picture(config, picture, layout, crop, opener)
    kept = cropping.apply(decoded, crop)
    (height, width), (resized_height, resized_width) = crop.target_hw, crop.resized_hw
    source = manifest.sources[picture.source]
    yield PreviewRow(
        name=picture.name, original_hw=crop.original_hw, bucket_hw=crop.target_hw, scale=crop.scale,
        cropped=max(0.0, 1 - height * width / (resized_height * resized_width)), time_ids=crop.time_ids,
        crop_box=(
            crop.top / resized_height, crop.left / resized_width,
            min(1.0, (crop.top + height) / resized_height), min(1.0, (crop.left + width) / resized_width),
        ),
        flipped=crop.flipped, picture=encode_webp(smaller(kept, CROP_PX)),
        original=encode_webp(smaller(decoded.pixels, THUMBNAIL_PX)), mime=MIME,
        captions=tuple(texts_of(config, layout, row)), mask=mask,
        loss_weight=float(samples.loss_weights[row]), repeats=f"{float(layout.repeats[picture.source]):.3g}",
        source=public_name(source.path), role=source.role, remarks=(*remarks_on(kept, crop.scale), *trouble),
    )  # fmt: skip


def view_of(config: Config, samples: Samples, row: int) -> int:
    """One of the row's crops, which take turns from row to row; mirrored as often as samples are."""
    if config.crop.flip_prob == 0:
        return row % samples.num_views
    flipped = generator(config.run.seed, "preview/flip", row).random() < config.crop.flip_prob
    return 2 * (row % (samples.num_views // 2)) + int(flipped)


def decode(config: Config, picture: Picture, opener: Opener) -> Decoded | None:
    try:
        with opener.open(picture.place) as file:
            return decode_image(file, config.data.alpha_color, config.data.max_pixels)
    except (BadImage, StorageError, OSError):
        return None


def smaller(pixels: Pixels, side_px: int) -> Pixels:
    """The picture with its long side at most so long."""
    height, width = pixels.shape[:2]
    scale = side_px / max(height, width)
    return pixels if scale >= 1 else resize(pixels, (max(1, round(height * scale)), max(1, round(width * scale))))


def mask_picture(
    config: Config, picture: Picture, layout: Layout, crop: cropping.Crop, opener: Opener
) -> tuple[bytes | None, tuple[str, ...]]:
    """Where the loss of this picture counts, as a picture; and what is wrong with its mask."""
    if picture.mask is None:
        return None, ()
    load = load_alpha if layout.manifest.sources[picture.source].masks == "alpha" else load_mask
    try:
        with opener.open(picture.mask) as file:
            mask = load(file, config.data.max_pixels)
    except (BadImage, StorageError, OSError) as error:
        return None, (f"its mask cannot be used: {error}",)
    grey = smaller(np.repeat(cropping.apply_mask(mask, crop)[:, :, None], 3, axis=2), THUMBNAIL_PX)
    return encode_webp(grey), ()


def texts_of(config: Config, layout: Layout, row: int) -> Iterator[Caption]:
    """The captions of a row as they are encoded, most frequent first. Of those rendered anew each time, some."""
    samples = layout.train.samples
    texts = samples.text_of[row]
    if samples.captions is not None:
        written = [samples.captions[text] for text in texts]
        policy = layout.policies[int(samples.sources[row])]
        drawn = [
            render(written, policy, generator(config.run.seed, "preview", RENDERINGS * row + number), drop_probs=layout.drop_probs)
            for number in range(RENDERINGS)
        ]
        few = len(set(drawn)) <= SHOWN_TEXTS  # of many, each comes too seldom to say how often
        shares = {text: drawn.count(text) / RENDERINGS if few else 0.0 for text in dict.fromkeys(drawn)}
    else:
        shares = {layout.train.texts[text]: float(samples.text_weights[text]) for text in texts}
    kept = 1 - config.captions.dropout_prob
    for text, share in sorted(shares.items(), key=lambda pair: -pair[1])[:SHOWN_TEXTS]:
        chunks = tuple(tuple(token_text(token) for token in ids) for ids in chunk(text))
        yield Caption(text, share * kept if share and len(shares) > 1 else 1.0, chunks)


def remarks_on(kept: Pixels, scale: float) -> Iterator[str]:
    if scale > MUCH_ENLARGED:
        yield f"is enlarged {scale:.1f} times"
    if contrast(kept) < FLAT_BELOW:
        yield "is almost of one colour"
    elif (value := sharpness(kept)) < BLURRED_BELOW:
        yield f"looks blurred (sharpness {value:.0f}; most pictures have hundreds)"


# All pictures


def look_at_all(config: Config, manifest: Manifest, rows: Sequence[int], opener: Opener) -> dict[int, Look]:
    """What the pictures of these manifest rows look like; those that cannot be decoded are left out."""
    found: dict[int, Look] = {}

    def look(row: int) -> tuple[int, Look | None]:
        decoded = decode(config, manifest.picture(row), opener)
        if decoded is None:
            return row, None
        small = smaller(decoded.pixels, 1024)
        return row, Look(sharpness(small), contrast(small), fingerprint(small), encode_webp(smaller(small, 96)))

    with track("looking at pictures", len(rows)) as on_progress, quiet_decoders(), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for done, (row, seen) in enumerate(pool.map(look, rows), start=1):
            if seen is not None:
                found[row] = seen
            on_progress(done, len(rows))
    return found


def summary(config: Config, layout: Layout, looks: dict[int, Look]) -> Summary:
    """What stands around the pictures."""
    manifest, samples = layout.manifest, layout.train.samples
    facts = (
        ("pictures", f"{len(manifest):,} used, {len(manifest.rejected):,} left out"),
        ("trained", f"{len(samples):,}"),
        ("held out", f"{len(layout.held_out.rows):,}" if not layout.held_out_is_trained else "none"),
        ("buckets", f"{len(layout.report)}"),
        ("captions", "rendered anew at every step" if renders_online(config) else f"{len(set(layout.train.texts)):,} to encode"),
        ("crops", crops_text(config, samples)),
        ("looked at", f"{len(looks):,}"),
    )
    names = [manifest.picture(row).name for row in looks]
    first = [(manifest.picture(row).captions or ("",))[0] for row in looks]
    tables = [("Buckets", report_text(layout.report))]
    if names:
        tables.append(("Captions", caption_report(names, first, [chunk_report(text) for text in first])))
    if names and config.captions.style == "tags":
        tables.append(("Tags", frequency_text(count_tags(first, config.captions.separator))))
    tables.append(("Every file accounted for", ledger_text(manifest)))
    return Summary(f"What will be trained: {config.run.name}", facts, plot_png(layout), tuple(tables), tuple(lists(layout, looks)), MIME)


def crops_text(config: Config, samples: Samples) -> str:
    """How many there are of a picture, and how often they are mirrored."""
    mirrored = config.crop.flip_prob
    different = samples.num_views // (2 if mirrored else 1)
    return f"{different} per picture" + (f", {mirrored:.0%} of the samples mirrored" if mirrored else "")


def lists(layout: Layout, looks: dict[int, Look]) -> Iterator[Listed]:
    """Copies, look-alikes, and pictures that are blurred, empty or much enlarged; only lists with something on them."""
    manifest = layout.manifest
    alike = _look_alikes(manifest, looks)
    every = (
        Listed("Exact copies", "The same bytes under more than one name.", *_groups(manifest, looks, _copies(manifest))),
        Listed("Look-alikes", "Nearly the same picture: resized, saved again, trimmed.", *_groups(manifest, looks, alike)),
        _listed("Blurred", f"Sharpness below {BLURRED_BELOW:.0f}.", manifest, looks, _said(looks, _blur)),
        _listed("Almost of one colour", "There is little to learn from these.", manifest, looks, _said(looks, _flatness)),
        _listed("Much enlarged", f"More than {MUCH_ENLARGED} times: they are softer than the rest.", manifest, looks, _enlarged(layout)),
    )  # fmt: skip
    yield from (listed for listed in every if listed.entries)


def _blur(look: Look) -> str:
    return f"sharpness {look.sharpness:.0f}" if look.sharpness < BLURRED_BELOW and look.contrast >= FLAT_BELOW else ""


def _flatness(look: Look) -> str:
    return f"contrast {look.contrast:.1f}" if look.contrast < FLAT_BELOW else ""


def _said(looks: dict[int, Look], say: Callable[[Look], str]) -> dict[int, str]:
    return {row: text for row, look in looks.items() if (text := say(look))}


def _listed(title: str, about: str, manifest: Manifest, looks: dict[int, Look], said: dict[int, str]) -> Listed:
    entries = tuple((manifest.picture(row).name, text) for row, text in said.items())
    return Listed(title, about, entries, tuple((looks[row].thumbnail,) if row in looks else () for row in said))


def _groups(
    manifest: Manifest, looks: dict[int, Look], groups: Sequence[Sequence[int]]
) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[bytes, ...], ...]]:
    names = [[manifest.picture(row).name for row in group] for group in groups]
    entries = tuple((first, "and " + ", ".join(others)) for first, *others in names)
    return entries, tuple(tuple(looks[row].thumbnail for row in group[:6] if row in looks) for group in groups)


def _copies(manifest: Manifest) -> list[list[int]]:
    _, which, counts = np.unique(manifest.digests, axis=0, return_inverse=True, return_counts=True)
    which = which.reshape(-1)
    return [np.flatnonzero(which == group).tolist() for group in np.flatnonzero(counts > 1)]


def _look_alikes(manifest: Manifest, looks: dict[int, Look]) -> list[list[int]]:
    """Of exact copies, which are listed by themselves, only the first."""
    first = {manifest.digests[row].tobytes(): row for row in sorted(looks, reverse=True)}
    rows = sorted(row for row in first.values() if looks[row].contrast >= FLAT_BELOW)
    return [[rows[place] for place in group] for group in near_duplicates([looks[row].fingerprint for row in rows])]


def _enlarged(layout: Layout) -> dict[int, str]:
    sizes, targets = _sizes(layout)
    _, scale = fit_loss(sizes, targets)
    largest_first = np.argsort(-scale, kind="stable")
    return {int(layout.train.rows[row]): f"{scale[row]:.1f} times" for row in largest_first[: int((scale > MUCH_ENLARGED).sum())]}
