"""`aquatint evaluate`: from a config to scores of a model's pictures. A second composition root, beside `build`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aquatint.config.schema import Config, dump
from aquatint.data import crop as cropping
from aquatint.data.captions import variants
from aquatint.data.image import Pixels, decode_image, quiet_decoders
from aquatint.data.manifest import by_content
from aquatint.errors import DataError, UsageError
from aquatint.models.judges import Clip, Dinov2, Inception, Judge, Rows
from aquatint.models.sdxl.conditioning import TextEncoders
from aquatint.models.sdxl.load import BaseModel, open_base
from aquatint.storage import check_writable, digest_file, write_json
from aquatint.training import checkpoint
from aquatint.training.build import environment
from aquatint.training.comparison import (
    CLIP,
    DINOV2,
    INCEPTION,
    NEEDED,
    Painter,
    Shelf,
    Subject,
    drawn_together,
    scores,
    see_made,
    see_real,
)
from aquatint.training.find import opener_of
from aquatint.training.focus_points import focus_points
from aquatint.training.layout import Layout
from aquatint.training.objectives import choose_objective, choose_process, sampling_schedule, sampling_steps
from aquatint.training.parallelize import choose_device
from aquatint.training.preview import planned
from aquatint.training.results import load_caption_encoder, load_unet, trained_weights
from aquatint.training.sampling import TextEmbeds
from aquatint.utils.progress import say, track

BASE = "base"  # the name of the model that a run started from
KINDS: dict[str, Callable[[Path, torch.device], Judge]] = {CLIP: Clip, DINOV2: Dinov2, INCEPTION: Inception}
LABELS = {
    "clip_score": ("CLIP score", "higher is better"), "clip_score_real": ("  of the real ones", ""), "cmmd": ("CMMD", "lower is better"),
    "fd_dinov2": ("FD-DINOv2", "lower is better"), "fid": ("FID", "lower is better"),
}  # fmt: skip
NOT_DRAWING = {"every", "prompts", "height", "width"}  # settings of `samples` that are of no effect here


@dataclass(frozen=True)
class Evaluation:
    """What was found, as it is in the file `path`."""

    path: Path
    report: dict[str, Any]


def evaluate_run(config: Config, name: str | None = None, *, keep_pictures: bool = False) -> Evaluation:
    """Draws captions with a checkpoint (the newest, or the base if there is none), compares, and writes what was found.

    Raises AquatintError. Nothing of the run is changed but its folder `evaluation`.
    """
    device, folder = choose_device(config.training.device), config.run.folder / config.run.name / "evaluation"
    judges = load_judges(config, device)
    check_writable(folder)
    base = open_base(config.model.base, config.model.vae)
    subjects, notes = choose_subjects(config, planned(config))
    unet, name, weights = load_model(config, base, name, device)
    with track("looking at real pictures", len(subjects)) as on_progress, quiet_decoders():
        subjects, real, left_out = see_real(subjects, judges, reader(config), config.evaluation.batch_size, on_progress)
    check_enough(subjects, left_out)
    encoder = load_caption_encoder(config, base, None if name == BASE else name, device)
    embeds, negative = encode_captions(config, encoder, subjects)
    shelf = Shelf(folder / name, recipe(config, base, weights, device)) if keep_pictures else None
    make = maker(build_painter(config, base, unet, negative, device), subjects, embeds, shelf)
    batches = list(drawn_together(subjects, embeds, config.evaluation.batch_size))
    say(f"drawing {len(subjects):,} captions with {name}")
    with track("drawing", len(subjects)) as on_progress:
        made = see_made(subjects, judges, make, batches, on_progress)
    if shelf is not None:
        write_json(shelf.folder / "captions.json", captions_of(shelf, subjects))
    found = scores(real, made, embed_captions(judges, subjects, config.evaluation.batch_size))
    report = {
        "checkpoint": name, "scores": found, "pictures": len(subjects), "source": config.evaluation.source,
        "remarks": [*notes, *remarks(found, len(subjects))], "left_out": left_out, "weights": weights,
        "encoders": {one: {"path": str(getattr(config.evaluation, one)), "sha256": judge.digest} for one, judge in judges.items()},
        "samples": drawing_settings(config), "environment": environment(),
    }  # fmt: skip
    write_json(folder / f"{name}.json", report)
    return Evaluation(folder / f"{name}.json", report)


def report_text(report: Mapping[str, Any]) -> str:
    """The scores as a small table, with what is to be said about them."""
    whose = "trained" if report["source"] == "train" else "held-out"
    lines = [f"{report['checkpoint']}: {report['pictures']:,} {whose} pictures, and as many made of their captions"]
    for name, value in report["scores"].items():
        label, direction = LABELS[name]
        lines.append(f"{label:<20}{value:>12.4f}  {direction}".rstrip())
    lines += [f"note: {text}" for text in report["remarks"]]
    return "\n".join([*lines, *(f"left out: {name}: {reason}" for name, reason in report["left_out"].items())])


def load_judges(config: Config, device: torch.device) -> dict[str, Judge]:
    """The encoders that the config names. Raises UsageError if it names none, ModelFileError for those that cannot be used."""
    paths = {name: getattr(config.evaluation, name) for name in KINDS}
    if all(path is None for path in paths.values()):
        raise UsageError(
            "there is no encoder to measure pictures with",
            hint="set evaluation.clip, evaluation.dinov2 or evaluation.inception to files of yours; docs/evaluation.md says which",
        )
    return {name: KINDS[name](path, device) for name, path in paths.items() if path is not None}


def load_model(config: Config, base: BaseModel, name: str | None, device: torch.device) -> tuple[torch.nn.Module, str, dict[str, str]]:
    """The UNet of a checkpoint or of the base, its name, and the SHA-256 of all weights that draw."""
    digests = {"vae": base.digest("vae_encoder"), "text_encoders": base.digest("text_encoders")}
    checkpoints = config.run.folder / config.run.name / "checkpoints"
    if name == BASE or (name is None and not checkpoint.sorted_checkpoints(checkpoints)):
        return load_unet(config, base, None, device), BASE, digests | {"unet": base.digest("unet")}
    path, _ = trained_weights(config, name)
    return load_unet(config, base, path.name, device), path.name, digests | {"checkpoint": digest_file(path / "manifest.json")}


# The pictures and their captions


def choose_subjects(config: Config, layout: Layout) -> tuple[list[Subject], list[str]]:
    """The pictures of the lowest digests, each content once, and remarks on how many there are. Raises DataError for none."""
    section, manifest = config.evaluation, layout.manifest
    rows = source_rows(config, layout)
    order, first = by_content(manifest.digests[rows])
    rows = rows[order[first]]
    policies = [replace(one, shuffle=False, tag_drop_prob=0.0, categories=(), pick="first", variants=1) for one in layout.policies]
    subjects, bare = [], 0
    for picture, crop in zip(manifest.pictures(rows), crops_of(config, layout, rows), strict=True):
        caption = variants(picture.captions, picture.digest, policies[picture.source])[0]
        bare += not caption
        if caption:
            subjects.append(Subject(picture.name, picture.place, picture.digest, cropping.Crop.from_row(crop), caption))
        if len(subjects) == section.pictures:
            break
    notes = [f"{bare:,} pictures without a caption were passed over"] if bare else []
    if len(subjects) < section.pictures:
        notes.append(f"evaluation.pictures asks for {section.pictures:,}, and there are {len(subjects):,}")
    return subjects, notes


def source_rows(config: Config, layout: Layout) -> npt.NDArray[np.int64]:
    """Rows of the manifest that may be chosen. A source for validation is there as a whole, however few of it `train` measures."""
    manifest = layout.manifest
    if config.evaluation.source == "train":
        return layout.train.rows[manifest.has_role("train")[layout.train.rows]]
    if (is_measured := manifest.has_role("validation")).any():
        return np.flatnonzero(is_measured)
    if layout.held_out_is_trained:
        raise DataError("no pictures are held out", hint='set evaluation.source = "train", or hold some out with validation.share')
    return layout.held_out.rows


def crops_of(config: Config, layout: Layout, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """(n, 9): each picture cut to its bucket, from its middle or from what stands out in it."""
    manifest = layout.manifest
    sizes_hw = manifest.sizes_hw[rows]
    targets_hw = layout.plan.shapes[layout.plan.place(sizes_hw)]
    positions = np.full((len(rows), 1, 2), 0.5)
    if config.crop.mode == "focus":
        points = focus_points(config, manifest, opener_of(config)) or {}
        found = np.array([points[digest.tobytes()] for digest in manifest.digests[rows]]).reshape(-1, 2)
        positions = cropping.positions_for_focus(sizes_hw, targets_hw, found)[:, None]
    return cropping.fit_all(sizes_hw, targets_hw, positions)[:, 0]


def reader(config: Config) -> Callable[[Subject], Pixels]:
    """Reads a real picture as it would be trained."""
    opener, section = opener_of(config), config.data

    def read(subject: Subject) -> Pixels:
        with opener.open(subject.place) as file:
            return cropping.apply(decode_image(file, section.alpha_color, section.max_pixels), subject.crop)

    return read


def check_enough(subjects: Sequence[Subject], left_out: Mapping[str, str]) -> None:
    """Raises DataError if too few pictures are left to be compared at all."""
    if len(subjects) < 2:
        why = "".join(f"; {name} {reason}" for name, reason in left_out.items())
        raise DataError(
            f"there are {len(subjects)} pictures with a caption to compare with, and two is the least{why}",
            hint='hold more out with validation.share, or set evaluation.source = "train"',
        )


# Drawing


def encode_captions(config: Config, encoder: TextEncoders, subjects: Sequence[Subject]) -> tuple[list[TextEmbeds], TextEmbeds | None]:
    """The embeddings of each caption, and of the negative prompt if there is one."""
    negative = config.samples.negative_prompt
    texts = list(dict.fromkeys([subject.caption for subject in subjects] + ([] if negative is None else [negative])))
    encoded = dict(zip(texts, encoder.encode(texts), strict=True))
    return [encoded[subject.caption] for subject in subjects], None if negative is None else encoded[negative]


def build_painter(config: Config, base: BaseModel, unet: torch.nn.Module, negative: TextEmbeds | None, device: torch.device) -> Painter:
    """The model with the settings that `samples` draws with."""
    process, objective = choose_process(config, base), choose_objective(config, base)
    vae = base.load_vae(torch.float32).to(device)
    return Painter(
        unet.eval(), vae, objective, lambda size_hw: sampling_schedule(config, process, size_hw, objective),
        sampling_steps(config, process), negative, config.samples.seed, device,
    )  # fmt: skip


def maker(
    painter: Painter, subjects: Sequence[Subject], embeds: Sequence[TextEmbeds], shelf: Shelf | None
) -> Callable[[Sequence[int]], list[Pixels]]:
    """Draws the counterparts of some subjects. With a shelf, takes from it what is there, and puts the rest there."""

    def make(indices: Sequence[int]) -> list[Pixels]:
        kept = {i: shelf.read(subjects[i]) for i in indices} if shelf is not None else {}
        missing = [i for i in indices if kept.get(i) is None]
        drawn = painter.paint([subjects[i] for i in missing], [embeds[i] for i in missing]) if missing else []
        fresh = dict(zip(missing, drawn, strict=True))
        if shelf is not None:
            for index, picture in fresh.items():
                shelf.keep(subjects[index], picture)
        return [fresh[i] if i in fresh else kept[i] for i in indices]  # type: ignore[misc]

    return make


def captions_of(shelf: Shelf, subjects: Sequence[Subject]) -> dict[str, dict[str, str]]:
    """What the files of a shelf are of, by their names."""
    return {shelf.path(one).name: {"picture": one.name, "caption": one.caption} for one in subjects}


def drawing_settings(config: Config) -> dict[str, Any]:
    """The settings of `samples` that decide a picture here: its shape is the real one's."""
    return {name: value for name, value in dump(config)["samples"].items() if name not in NOT_DRAWING}


def recipe(config: Config, base: BaseModel, weights: Mapping[str, str], device: torch.device) -> str:
    """A digest of all that decides a picture beside its subject."""
    text = {
        "weights": dict(weights), "samples": drawing_settings(config), "process": repr(choose_process(config, base)),
        "reindexes": choose_objective(config, base).reindexes, "device": device.type,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()


# Scores


def embed_captions(judges: Mapping[str, Judge], subjects: Sequence[Subject], batch_size: int) -> Rows | None:
    """CLIP's embeddings of the captions, if CLIP is among the encoders."""
    clip = judges.get(CLIP)
    if not isinstance(clip, Clip):
        return None
    captions = [subject.caption for subject in subjects]
    return np.concatenate([clip.embed_texts(captions[start : start + batch_size]) for start in range(0, len(captions), batch_size)])


def remarks(found: Mapping[str, float], num_pictures: int) -> list[str]:
    """What should be known before a score of so few pictures is believed."""
    return [
        f"{LABELS[name][0]} wants {least:,} pictures or more: of {num_pictures:,}, it mostly tells how few they are"
        for name, least in NEEDED.items()
        if name in found and num_pictures < least
    ]
