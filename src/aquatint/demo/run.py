"""The main job on a set that the program makes itself: pictures, a tiny model, training, export, and a look at the result."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np

from aquatint.config.load import load_config
from aquatint.data.contact_sheet import contact_sheet
from aquatint.data.image import save_png
from aquatint.demo.model import write_tiny_base
from aquatint.demo.pictures import COLORS, GROUNDS, PLACES, SHAPES, Scene, scenes, write_pictures
from aquatint.demo.score import Seen, look
from aquatint.models.sdxl.process import Process
from aquatint.storage import write_text
from aquatint.tensor_file import TensorFile
from aquatint.tracking.files import read_rows
from aquatint.training.build import train_run
from aquatint.training.results import sample_pictures
from aquatint.utils.progress import say

NUM_PICTURES = 576  # every scene six times


@dataclass(frozen=True)
class DemoResult:
    """What the demo reached. `obeyed` of `prompts` sample pictures have the ground, colour and place their prompt names."""

    folder: Path
    first_loss: float
    last_loss: float
    obeyed: int
    right_shapes: int
    prompts: int
    exported: Path


def prompts() -> tuple[Scene, ...]:
    """Sixteen scenes that show every colour, shape, place and ground."""
    colors, shapes, places, grounds = list(COLORS), list(SHAPES), list(PLACES), list(GROUNDS)
    return tuple(Scene(colors[i % 4], shapes[i % 3], places[(i + i // 4) % 4], grounds[(i // 4 + i // 2) % 2]) for i in range(16))


def write_inputs(folder: Path, template: str) -> Path:
    """Makes pictures, base model and config; returns the config's path. What is there already is made again, the same."""
    write_pictures(folder / "pictures", count=NUM_PICTURES, seed=0)
    with as_file(files("aquatint.demo") / "assets" / "autoencoder.safetensors") as path, TensorFile(path) as file:
        vae = {name: file.read(name).float() for name in file.tensors}
    captions = [scene.caption for scene in scenes()]
    write_tiny_base(
        folder / "base.safetensors", seed=2, vae_tensors=vae, process=Process("v_prediction", zero_terminal_snr=True), captions=captions
    )
    lines = "\n".join(f'    "{scene.caption}",' for scene in prompts())
    write_text(folder / "run.toml", template.replace("PROMPTS", lines))
    return folder / "run.toml"


def run_demo(folder: Path) -> DemoResult:
    """Trains the demo in `folder` (or goes on with it), exports, samples from the exported file, and measures."""
    folder = folder.absolute()
    say(f"making {NUM_PICTURES} captioned pictures and a tiny SDXL in {folder}")
    config = load_config(write_inputs(folder, (files("aquatint.demo") / "assets" / "run.toml").read_text()), [])
    result = train_run(config)
    exported = result.exported[0]
    section = config.model.model_copy(update={"base": exported, "prediction": "auto", "zero_terminal_snr": "auto"})
    pictures = sample_pictures(config.model_copy(update={"model": section}))
    asked = prompts()
    seen = [look(picture) for picture in pictures]
    labels = [f"{scene.caption} [{verdict(scene, one)}]" for scene, one in zip(asked, seen, strict=True)]
    save_png(folder / "samples.png", contact_sheet(list(pictures), labels, columns=4))
    losses = [row["val_loss"] for row in read_rows(result.folder / "metrics.jsonl") if "val_loss" in row]
    obeyed = [one.obeys(scene) for scene, one in zip(asked, seen, strict=True)]
    shapes = [one.shape == scene.shape for scene, one in zip(asked, seen, strict=True)]
    return DemoResult(folder, losses[0], losses[-1], int(np.sum(obeyed)), int(np.sum(shapes)), len(asked), exported)


def verdict(scene: Scene, seen: Seen) -> str:
    """One word or two on a sample picture."""
    if seen.obeys(scene):
        return "as asked"
    return f"shows {seen.color or 'nothing'} {seen.place or ''}, {seen.ground}".replace(" ,", ",")


def summary(result: DemoResult) -> str:
    """What the demo prints at its end."""
    return (
        f"validation loss {result.first_loss:.3f} -> {result.last_loss:.3f}\n"
        f"prompts obeyed  {result.obeyed} of {result.prompts} (colour, place and background, measured; "
        f"{result.right_shapes} have the right shape too)\n"
        f"sample pictures {result.folder / 'samples.png'}\n"
        f"loss curve      {result.folder / 'runs' / 'demo' / 'loss.png'}\n"
        f"exported model  {result.exported}"
    )
