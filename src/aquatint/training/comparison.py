"""Real pictures and pictures made of their captions, seen by the same encoders: how far the two sets are apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aquatint.data.crop import Crop
from aquatint.data.image import BadImage, Pixels, load_image, save_png
from aquatint.data.places import Place
from aquatint.diffusion.metrics import clip_score, cmmd, frechet_distance, moments
from aquatint.diffusion.schedule import Schedule
from aquatint.errors import DataError
from aquatint.models.judges import Judge, Rows
from aquatint.models.sdxl.generate import Steps, generate
from aquatint.training.objective import Objective
from aquatint.training.sampling import TextEmbeds, stack

CLIP, DINOV2, INCEPTION = "clip", "dinov2", "inception"  # the encoders' settings
NEEDED = {"cmmd": 1_000, "fd_dinov2": 1_000, "fid": 10_000}  # pictures, below which a score says little (arXiv 2401.09603, 2306.04675)
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Subject:
    """A real picture, cut as it would be trained, and its caption."""

    name: str
    place: Place
    digest: bytes
    crop: Crop
    caption: str

    @property
    def noise_position(self) -> int:
        """Where the noise of its counterpart comes from: its content decides, whichever other pictures there are."""
        return int.from_bytes(self.digest[:8], "big")


# Seeing


def see_real(
    subjects: Sequence[Subject], judges: Mapping[str, Judge], read: Callable[[Subject], Pixels], batch_size: int, on_progress: OnProgress
) -> tuple[list[Subject], dict[str, Rows], dict[str, str]]:
    """The pictures that could be read, their embeddings by encoder, and why others are left out, by name."""
    kept: list[Subject] = []
    left_out: dict[str, str] = {}
    parts: dict[str, list[Rows]] = {name: [] for name in judges}
    for start in range(0, len(subjects), batch_size):
        pictures = []
        for subject in subjects[start : start + batch_size]:
            try:
                pictures.append(read(subject))
                kept.append(subject)
            except (BadImage, OSError) as error:
                left_out[subject.name] = str(error)
        if pictures:
            for name, judge in judges.items():
                parts[name].append(judge.embed(pictures))
        on_progress(min(start + batch_size, len(subjects)), len(subjects))
    return kept, {name: np.concatenate(rows) for name, rows in parts.items() if rows}, left_out


def see_made(
    subjects: Sequence[Subject],
    judges: Mapping[str, Judge],
    make: Callable[[Sequence[int]], Sequence[Pixels]],
    batches: Sequence[Sequence[int]],
    on_progress: OnProgress,
) -> dict[str, Rows]:
    """Embeddings by encoder, in the order of the subjects; `make` draws the counterparts of the subjects of these indices."""
    rows: dict[str, list[Any]] = {name: [None] * len(subjects) for name in judges}
    done = 0
    for indices in batches:
        pictures = make(indices)
        for name, judge in judges.items():
            for index, row in zip(indices, judge.embed(pictures), strict=True):
                rows[name][index] = row
        done += len(indices)
        on_progress(done, len(subjects))
    return {name: np.stack(found) for name, found in rows.items()}


def drawn_together(subjects: Sequence[Subject], embeds: Sequence[TextEmbeds], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of one shape and one number of tokens."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (subject, (hidden, _)) in enumerate(zip(subjects, embeds, strict=True)):
        groups.setdefault((*subject.crop.target_hw, len(hidden)), []).append(index)
    yield from (group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size))


def scores(real: Mapping[str, Rows], made: Mapping[str, Rows], captions: Rows | None) -> dict[str, float]:
    """All that the encoders allow. `captions` are CLIP's embeddings; `clip_score_real` is what the real pictures reach themselves."""
    found = {}
    if CLIP in made and captions is not None:
        found["clip_score"] = clip_score(made[CLIP], captions)
        found["clip_score_real"] = clip_score(real[CLIP], captions)
        found["cmmd"] = cmmd(real[CLIP], made[CLIP])
    for name, encoder in ("fd_dinov2", DINOV2), ("fid", INCEPTION):
        if encoder in made:
            found[name] = frechet_distance(moments(real[encoder]), moments(made[encoder]))
    return found


# Making


@dataclass(frozen=True)
class Painter:
    """A model that draws, with noise that depends on seed and subject alone. `negative` is None for the zero unconditional."""

    unet: torch.nn.Module
    vae: Any
    objective: Objective
    schedule_for: Callable[[tuple[int, int]], Schedule]
    steps: Steps
    negative: TextEmbeds | None
    seed: int
    device: torch.device

    def paint(self, subjects: Sequence[Subject], embeds: Sequence[TextEmbeds]) -> list[Pixels]:
        """The counterparts of subjects of one shape, with prompts of one length."""
        height, width = subjects[0].crop.target_hw
        negative = self.negative and stack([self.negative] * len(subjects), self.device)
        return list(
            generate(
                self.unet, self.vae, self.schedule_for((height, width)), self.objective.prediction, stack(embeds, self.device), negative,
                steps=self.steps, seed=self.seed, positions=[subject.noise_position for subject in subjects], height=height, width=width,
                sigma_data=self.objective.sigma_data, scaling=self.objective.scaling,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class Shelf:
    """A folder of made pictures, each named after all that decides it. `recipe` is what they have in common."""

    folder: Path
    recipe: str

    def path(self, subject: Subject) -> Path:
        text = f"{self.recipe}\n{subject.digest.hex()}\n{subject.crop.target_hw}\n{subject.caption}"
        return self.folder / f"{hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=12).hexdigest()}.png"

    def read(self, subject: Subject) -> Pixels | None:
        """The picture if it is there. Raises DataError for one that is damaged."""
        path, (height, width) = self.path(subject), subject.crop.target_hw
        if not path.exists():
            return None
        try:
            with path.open("rb") as file:
                return load_image(file, "#ffffff", height * width)
        except BadImage as error:
            raise DataError(f"{path} {error}", hint="remove the file: the picture is made again") from error

    def keep(self, subject: Subject, picture: Pixels) -> None:
        save_png(self.path(subject), picture)
