"""What a run shows and leaves behind: measurements, pictures, checkpoints, exports, logs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from aquatint.config.duration import Duration
from aquatint.config.sections.fields import Every, Section, Share


class ValidationSection(Section):
    every: Every = Duration(500, "steps")
    """How often the loss on held-out pictures is measured. "never" turns it off; the first and last step are always measured."""
    share: Annotated[float, Field(ge=0.0, le=0.5)] = 0.02
    """Share of the pictures that is held out, chosen by content. 0 measures on pictures of the training set instead."""
    max_pictures: Annotated[int, Field(ge=1)] = 64
    """No more pictures than this are measured (and held out)."""
    timesteps: Annotated[int, Field(ge=1, le=100)] = 8
    """How many noise levels each picture is measured at; the terminal one is added with zero terminal SNR."""
    train_pictures: Annotated[int, Field(ge=0)] = 16
    """So many pictures of the training set are measured in the same way: the gap shows what is only known by heart."""
    overfit_after: Annotated[int, Field(ge=1)] = 3
    """Warn when the held-out loss was above its best so many times in a row, while that of trained pictures went on falling."""
    stop_after: Annotated[int, Field(ge=0)] = 0
    """End the run when the held-out loss has not improved so many times in a row. 0 never does."""
    worst: Annotated[int, Field(ge=0, le=1000)] = 20
    """So many pictures with the highest loss, for their noise levels, are named in `worst.txt`."""


class SamplesSection(Section):
    every: Every = Duration(500, "steps")
    """How often pictures are made from `prompts`. "never" turns it off."""
    prompts: tuple[str, ...] = ()
    """One picture is made of each."""
    negative_prompt: str | None = None
    """What to stay away from. Without it the unconditional input is zeros; with it, also with "", it is encoded text."""
    height: Annotated[int, Field(ge=32, multiple_of=32)] | None = None
    """Height of the pictures, in pixels. Without height and width, they have the shape that is trained most."""
    width: Annotated[int, Field(ge=32, multiple_of=32)] | None = None
    """Width of the pictures, in pixels."""
    sampler: Literal["euler", "heun", "dpmpp_2m", "euler_ancestral"] = "euler"
    """How the steps are taken. `heun` asks the UNet twice per step."""
    grid: Literal["auto", "trailing", "leading", "sgm_uniform", "karras", "exponential"] = "auto"
    """Where the steps lie. `auto` is trailing, and karras for EDM noise levels."""
    sigma_max: Literal["exact", "novelai", "comfyui", "diffusers"] = "exact"
    """Where sampling starts with zero terminal SNR: from infinity, or from what another program puts in its place."""
    shift: Annotated[float, Field(ge=0.01, le=100.0)] = 1.0
    """Spend the steps at noise so many times as strong. For flow models, as in the node ModelSamplingSD3."""
    weights: Literal["average", "raw"] = "average"
    """Which weights draw: the moving average, if there is one, or the trained ones."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 28
    """Sampling steps."""
    guidance_scale: Annotated[float, Field(ge=0.0)] = 5.0
    """Classifier-free guidance; 1 turns it off."""
    guidance_rescale: Share = 0.0
    """Pull the guided prediction back to the strength of the unguided one (arXiv 2305.08891); 0.7 suits zero terminal SNR."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The same noise is used at every event."""


class EvaluationSection(Section):
    clip: Path | None = None
    """A CLIP folder as transformers saves it, for the CLIP score and CMMD; ViT-L/14 at 336 pixels is what CMMD is defined with."""
    dinov2: Path | None = None
    """A DINOv2 folder as transformers saves it, for FD-DINOv2."""
    inception: Path | None = None
    """The Inception network of FID as a `.safetensors` file, for FID; docs/evaluation.md says how to make it."""
    source: Literal["held_out", "train"] = "held_out"
    """Whose captions are drawn, and with which pictures the result is compared: those held out, or trained ones."""
    pictures: Annotated[int, Field(ge=2)] = 1000
    """How many pictures are made, one for each caption. FD-DINOv2 and CMMD need 1,000 or more, FID 10,000."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """How many pictures are made and measured at once."""


class CheckpointsSection(Section):
    every: Duration = Duration(500, "steps")
    """How often the run is saved so that it can go on exactly. It is always saved at its end and on Ctrl-C."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many checkpoints stay; older ones of this run are removed after a newer one is safely on disk."""
    keep_best: bool = False
    """Save each step with a lower held-out loss than any before, and keep the last of them beside the newest."""
    background: Literal["auto"] | bool = "auto"
    """Write during training, from a copy in memory of what is saved: `auto` on GPUs if half the free memory will do, `true` if it fits."""


class ExportSection(Section):
    single_file: bool = True
    """Write one `.safetensors` file for ComfyUI, A1111 and Forge at the end."""
    diffusers_folder: bool = False
    """Write a diffusers folder at the end."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Number format of the trained weights in the export. Parts that were not trained are copied as they are."""
    title: str | None = None
    """Title in the file's metadata; the run's name if not set."""
    author: str | None = None
    """Author in the file's metadata."""
    license: str | None = None
    """Licence in the file's metadata."""
    lora_names: Annotated[tuple[Literal["kohya", "diffusers"], ...], Field(min_length=1)] = ("kohya",)
    """Names in the file of an adapter: those of `kohya` (for ComfyUI, A1111 and Forge), of `diffusers`, or a file of each."""
    merged: bool = False
    """Of an adapter: write the whole model too, with the adapter in its weights, as `single_file` and `diffusers_folder` say."""


class WandbSection(Section):
    enabled: bool = False
    """Log to Weights & Biases (`pip install aquatint[wandb]`)."""
    project: str = "aquatint"
    """Project on W&B."""
    entity: str | None = None
    """Team or user on W&B."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes files that `wandb sync` can upload later. The API key comes from WANDB_API_KEY or `wandb login`."""


class TrackingSection(Section):
    log_every: Duration = Duration(10, "steps")
    """How often a row is written to `metrics.jsonl`, which is always kept."""
    tensorboard: bool = False
    """Log to TensorBoard too (`pip install aquatint[tensorboard]`)."""
    wandb: WandbSection = WandbSection()
    """Weights & Biases."""
