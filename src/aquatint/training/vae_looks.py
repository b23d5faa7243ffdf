"""What a trained decoder is judged by: numbers and a sheet of pictures that were not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from aquatint.data.contact_sheet import contact_sheet
from aquatint.data.image import Pixels, save_png
from aquatint.models.perceptual import perceptual_distance
from aquatint.tracking.tracker import Tracker
from aquatint.training.state import TrainState
from aquatint.training.step import StepReport
from aquatint.training.tasks import Action, write_row
from aquatint.training.trainer import Display
from aquatint.training.vae_pictures import PictureBatch
from aquatint.training.vae_step import VaeParts, VaeReport, reconstruct

MAX_SHOWN = 4
PEAK = 2.0  # from -1 to 1

Batches = Callable[[], Iterable[PictureBatch]]


@torch.no_grad()
def measure(parts: VaeParts, batches: Iterable[PictureBatch]) -> dict[str, float]:
    """Means over pictures: `val_l1` of values from -1 to 1, `val_psnr` in dB, and `val_perceptual` if that is trained on."""
    rows = []
    for batch in batches:
        batch = batch.to(parts.device)
        output = reconstruct(parts, batch).clamp(-1, 1)
        error = (output - batch.images).double().flatten(1)
        columns = [error.abs().mean(dim=1), 10 * torch.log10(PEAK**2 / error.square().mean(dim=1))]
        if parts.loss.perceptual is not None:
            columns.append(perceptual_distance(parts.loss.perceptual, output, batch.images).double())
        rows.append(torch.stack(columns, dim=1).cpu())
    means = torch.cat(rows).mean(dim=0).tolist()
    return dict(zip(("val_l1", "val_psnr", "val_perceptual"), means, strict=False))


def validate_action(parts: VaeParts, batches: Batches, tracker: Tracker, display: Display) -> Action:
    """Measures the average, which is what gets exported, and the raw weights."""

    def run(state: TrainState, report: StepReport | None = None) -> TrainState:
        with parts.ema.applied():
            values = measure(parts, batches())
        values |= {f"{name}_raw": value for name, value in measure(parts, batches()).items()}
        write_row(tracker, state, values)
        display.note(f"step {state.step}: held-out L1 {values['val_l1']:.5f}, PSNR {values['val_psnr']:.2f} dB")
        return state

    return run


def log_action(tracker: Tracker) -> Action:
    """Writes the mean loss since the last row, and the parts of the last step's."""

    def run(state: TrainState, report: StepReport) -> TrainState:
        values = {"gradient_norm": report.gradient_norm, "learning_rate": report.learning_rate}
        if state.loss_count:
            values = {"loss": state.loss_sum / state.loss_count, **values}
        write_row(tracker, state, {**values, **(report.figures if isinstance(report, VaeReport) else {})})
        return state.logged()

    return run


@dataclass(frozen=True)
class Sheet:
    """Some held-out pictures, and what the base's own decoder makes of them."""

    batch: PictureBatch
    before: list[Pixels]


@torch.no_grad()
def decoded(parts: VaeParts, batch: PictureBatch) -> list[Pixels]:
    """The round trip of each picture, one at a time, as uint8 (S, S, 3)."""
    singles = (PictureBatch(batch.images[i : i + 1], batch.noise[i : i + 1], batch.names[i : i + 1]) for i in range(len(batch.names)))
    return [pixels(reconstruct(parts, single.to(parts.device))[0]) for single in singles]


def pixels(image: torch.Tensor) -> Pixels:
    """A picture (3, H, W) in [-1, 1] as uint8 (H, W, 3)."""
    found: Pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy()
    return found


def sheet_action(parts: VaeParts, sheet: Sheet, folder: Path, tracker: Tracker) -> Action:
    """Writes a row for each picture: the original, decoded as before, decoded as now (with the average)."""

    def run(state: TrainState, report: StepReport | None = None) -> TrainState:
        with parts.ema.applied():
            now = decoded(parts, sheet.batch)
        originals = [pixels(image) for image in sheet.batch.images]
        images = [one for row in zip(originals, sheet.before, now, strict=True) for one in row]
        labels = [label for name in sheet.batch.names for label in (name, "before", f"step {state.step}")]
        path = folder / f"step-{state.step:06}.png"
        save_png(path, contact_sheet(images, labels, columns=3))
        tracker.image(state.step, "samples", path)
        return state

    return run
