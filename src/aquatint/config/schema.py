"""The config, as frozen values. The text under each field is its help, in `--help`, `init` and the reference page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema
from pydantic.json_schema import GenerateJsonSchema

from aquatint.config.duration import PATTERN, Duration

NEVER = "never"  # how a config says that something is turned off: TOML has no null

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Color = Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$", json_schema_extra={"expected": 'a colour such as "#ffffff"'})]
LOCATION = "location"  # marks settings that are a path or a URL
Location = Annotated[str, Field(min_length=1, json_schema_extra={"format": "path"}), LOCATION]
Ending = Annotated[str, Field(pattern=r"^\.[A-Za-z0-9_.-]+$", json_schema_extra={"expected": 'a file ending such as ".txt"'})]
Every = Annotated[
    Duration | None,
    BeforeValidator(lambda value: None if value == NEVER else value),
    WithJsonSchema(
        {
            "anyOf": [{"type": "string", "pattern": PATTERN + f"|^{NEVER}$"}, {"type": "null"}],
            "expected": f'a duration such as "500 steps" or "2 epochs", or "{NEVER}"',
        }
    ),
]


class Section(BaseModel):
    """A part of the config: unknown keys are refused, values cannot change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class RunSection(Section):
    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", json_schema_extra={"expected": "a name of letters, digits, `.`, `_` and `-`"}),
    ] = "run"
    """Name of the run; its folder is `run.folder/run.name`."""
    folder: Path = Path("runs")
    """Where run folders are made. Relative paths start at the config file."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides the order of the pictures, the noise, and every other random choice."""


class ModelSection(Section):
    base: Path
    """The model to start from: one `.safetensors` file as ComfyUI, A1111 and Forge use it, or a diffusers folder."""
    vae: Path | None = None
    """Another autoencoder than the one in `base`: a `.safetensors` file or a diffusers folder."""
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the UNet predicts. `auto` keeps what the base model was trained for."""
    zero_terminal_snr: Literal["auto"] | bool = "auto"
    """Whether the last timestep is pure noise (arXiv 2305.08891). Needs v_prediction. `auto` keeps the base's own."""


class SourceSection(Section):
    path: Location
    """Pictures: a folder, a table (JSONL, CSV, Parquet, sd-scripts JSON), or tar shards; `*` and URLs (s3, gs, https) are fine."""
    kind: Literal["auto", "folder", "table", "tar"] = "auto"
    """What `path` is. `auto` tells by its ending, and takes a folder with a metadata.jsonl, .csv or .parquet as a table."""
    role: Literal["train", "regularization", "validation"] = "train"
    """`regularization`: pictures of the general class, beside your own. `validation`: only measured, never trained."""
    repeats: Annotated[float, Field(gt=0.0, le=10_000.0)] = 1.0
    """How often each picture is shown per epoch. 0.5 shows half of them in each, in turns."""
    share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of all samples that come from here, instead of `repeats`."""
    loss_weight: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    """Weight of its samples in the loss."""
    caption_extensions: Annotated[tuple[Ending, ...], Field(min_length=1)] = (".txt",)
    """The caption of `a.jpg` is in `a` plus the first of these that exists; a .json file may hold several."""
    caption_lines: Literal["whole", "alternatives"] = "whole"
    """`alternatives`: each line of a caption file is a caption of its own, of which each sample gets one."""
    trigger: str = ""
    """Words put before every caption from here."""
    picture_column: str | None = None
    """In a table: the column of paths, URLs or picture bytes. Found by its usual names if not set."""
    caption_columns: tuple[str, ...] = ()
    """In a table: the columns of captions; several are alternatives. Found by their usual names if not set."""
    mask_column: str | None = None
    """In a table: the column of mask paths."""
    masks: Literal["none", "alpha", "files"] = "none"
    """Where the loss counts: everywhere, where a picture is opaque, or where its mask file (`a-masklabel.png`) is white."""


class DataSection(Section):
    sources: Annotated[tuple[SourceSection, ...], Field(min_length=1)]
    """Where the pictures are: one `[[data.sources]]` table per folder or table."""
    alpha_color: Color = "#ffffff"
    """Colour behind transparent pictures."""
    max_pixels: Annotated[int, Field(ge=1)] = 100_000_000
    """A picture with more pixels than this is refused from its header, before it is decoded."""
    max_bad_share: Share = 0.01
    """The run is refused when more than this share of the pictures cannot be used. At least one bad one is allowed."""
    max_uncaptioned_share: Share = 0.01
    """The run is refused when more than this share of the pictures has no caption. 1 allows a set without captions."""
    mask_floor: Share = 0.0
    """Least weight of the loss outside of a mask."""


class BucketsSection(Section):
    set: Literal["aquatint", "kohya", "novelai", "sdxl_table"] = "aquatint"
    """Shapes to choose from. `aquatint` crops least; the others are as in those trainers, with their way of choosing."""
    resolution: Annotated[int, Field(ge=32)] = 1024
    """Side of the square that has the same area as the largest bucket, in pixels."""
    tiers: tuple[Annotated[int, Field(ge=32)], ...] = ()
    """Smaller resolutions, for pictures that would be enlarged more than `max_upscale` otherwise."""
    step: Annotated[int, Field(ge=32, multiple_of=32)] = 32
    """Bucket sides are multiples of this, in pixels. The UNet needs multiples of 32."""
    min_side: Annotated[int, Field(ge=32)] = 512
    """Shortest side of a bucket, in pixels; in a smaller tier, as much shorter as the tier is smaller."""
    max_side: Annotated[int, Field(ge=32)] = 2048
    """Longest side of a bucket, in pixels."""
    max_aspect: Annotated[float, Field(ge=1.0)] = 4.0
    """Widest bucket, as long side over short side."""
    area_weight: Annotated[float, Field(ge=0.0)] = 0.5
    """Price of a bucket smaller than `resolution` squared, against the price of cropping."""
    upscale_weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Price of enlarging a small picture, against the price of a smaller tier. Does nothing without `tiers`."""
    max_upscale: Annotated[float, Field(ge=1.0)] = 4.0
    """A picture that would be enlarged more than this many times in every tier is left out, with that reason."""


class CropSection(Section):
    mode: Literal["center", "random", "focus"] = "center"
    """Which part of the picture is kept where its shape differs from its bucket's. `focus` looks for what stands out."""
    variants: Annotated[int, Field(ge=1, le=64)] = 1
    """How many different random crops are cached per picture."""
    flip_prob: Share = 0.0
    """Share of the samples that are mirrored. Leave 0 for pictures with text, or characters that are not symmetric."""


class CategorySection(Section):
    tags: Annotated[tuple[str, ...], Field(min_length=1)]
    """Tags, or patterns with `*`, such as "artist:*"."""
    drop_prob: Share
    """Share of these tags that are left out, instead of `tag_drop_prob`."""


class TagWeightsSection(Section):
    enabled: bool = False
    """Weigh pictures with rare tags more in the loss, and those with frequent ones less; the mean over the set is 1."""
    power: Annotated[float, Field(ge=0.0, le=2.0)] = 0.5
    """A tag weighs (median count / its count) to this power."""
    lowest: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Least weight of a tag."""
    highest: Annotated[float, Field(ge=1.0)] = 2.0
    """Greatest weight of a tag."""
    ignore: tuple[str, ...] = ()
    """Further tags that say nothing about the subject; counts of people and quality tags are always ignored."""


class CaptionsSection(Section):
    style: Literal["tags", "prose"] = "prose"
    """`tags` are split at `separator`; `prose` is used as it is written."""
    separator: Annotated[str, Field(min_length=1)] = ","
    """What stands between tags."""
    shuffle: bool = False
    """Shuffle the tags, all but the first `keep_first`."""
    keep_first: Annotated[int, Field(ge=0)] = 1
    """How many leading tags are never moved and never dropped."""
    keep_separator: str = ""
    """Or: a mark such as "|||" in the captions; the tags before it are never moved and never dropped."""
    tag_drop_prob: Share = 0.0
    """Share of the other tags that are left out, each on its own."""
    tag_drop: Literal["uniform", "weighted"] = "uniform"
    """`weighted` drops frequent tags more often than rare ones, with the same share over all."""
    categories: tuple[CategorySection, ...] = ()
    """Tags with a drop share of their own: one `[[captions.categories]]` table each."""
    wildcards: bool = False
    """`{red|blue}` in a caption stands for one of the two."""
    pick: Literal["first", "random"] = "random"
    """Which caption is used of a picture that has several."""
    text: Literal["auto", "cached", "online"] = "auto"
    """`cached` encodes captions before the training; `online` at every step, each time rendered anew. `auto`: online if they vary."""
    variants: Annotated[int, Field(ge=1, le=64)] = 1
    """How many renderings of a caption (shuffled, tags dropped) are cached."""
    dropout_prob: Share = 0.1
    """Share of the samples that are trained without their caption, which is what makes guidance work."""
    dropout_zeros_share: Share = 0.5
    """Of those, the share that sees zeros (as A1111 and Forge do); the rest sees the encoded empty text (as ComfyUI does)."""
    tag_weights: TagWeightsSection = TagWeightsSection()
    """Loss weights by how rare a picture's tags are."""


class CacheSection(Section):
    folder: Path = Path("cache")
    """Where encoded pictures and captions are kept. Any number of runs can share it."""
    latent_dtype: Literal["float16", "float32"] = "float16"
    """Number format of the cached latents (mean and standard deviation)."""
    text_dtype: Literal["float16", "float32"] = "float16"
    """Number format of the cached text embeddings."""
    vae_precision: Literal["float32", "bfloat16"] = "float32"
    """Number format in which pictures are encoded. SDXL's own autoencoder overflows in float16, so that is not offered."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """How many pictures are encoded at once."""
    shard_entries: Annotated[int, Field(ge=1, le=65536)] = 256
    """How many entries one cache file holds."""
    engine: Literal["local", "processes", "ray"] = "local"
    """Who encodes: this process, several on this machine, or Ray tasks on a cluster (`pip install aquatint[ray]`)."""
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """How many encode at once with `processes` or `ray`; one per GPU."""
    memory_mib: Annotated[int, Field(ge=0)] = 0
    """Keep so much of the cache in each reading process's memory. 0: the system's own file cache does it."""


class LoaderSection(Section):
    workers: Annotated[int, Field(ge=0, le=64)] = 2
    """Processes that read batches ahead of the training step. 0 reads in the training process."""
    prefetch: Annotated[int, Field(ge=1, le=64)] = 4
    """Batches that each worker holds ready."""


class DiffusionSection(Section):
    weighting: Literal["auto", "none", "min_snr", "clamped_v"] = "auto"
    """Loss weight by noise level. `auto` is clamped_v with zero terminal SNR, and none without."""
    gamma: Annotated[float, Field(gt=0.0)] = 5.0
    """Where min_snr (arXiv 2303.09556) and clamped_v stop to grow with the SNR."""
    weight_floor: Share = 0.05
    """Least weight of min_snr with zero terminal SNR, where the last timestep would otherwise have weight 0."""


class AdamWSection(Section):
    name: Literal["adamw"] = "adamw"
    """AdamW (arXiv 1711.05101) of torch, fused, with float32 state."""
    learning_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-5
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay; norms and biases are left out."""


class AdamWBF16Section(Section):
    name: Literal["adamw_bf16"]
    """AdamW for bf16 weights: float32 math, stochastic rounding of the weights and of both moments (6 bytes a parameter in all)."""
    learning_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-5
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay; norms and biases are left out."""


class AdafactorSection(Section):
    name: Literal["adafactor"]
    """Adafactor (arXiv 1804.04235) with a fixed learning rate and almost no state."""
    learning_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-5
    """Peak learning rate: the size of a step, not scaled by the size of the weights."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay; norms and biases are left out."""
    clip_threshold: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest root mean square of one tensor's update."""
    decay_power: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """Second-moment decay at step t is 1 - t**-decay_power."""


def _optimizer_name(value: Any) -> Any:
    return value.get("name", "adamw") if isinstance(value, dict) else getattr(value, "name", None)


Optimizer = Annotated[
    Annotated[AdamWSection, Tag("adamw")] | Annotated[AdamWBF16Section, Tag("adamw_bf16")] | Annotated[AdafactorSection, Tag("adafactor")],
    Discriminator(_optimizer_name),
]


class LearningRateSection(Section):
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the learning rate after the warm-up."""
    warmup: Duration = Duration(0, "steps")
    """How long the learning rate takes to rise to its peak."""
    end_factor: Share = 0.0
    """Where cosine and linear end, as a share of the peak."""


class TrainingSection(Section):
    length: Duration = Duration(1000, "steps")
    """When the run ends, counted from its beginning, also after a resume."""
    batch_size: Annotated[int, Field(ge=1)] = 1
    """Pictures per forward pass. All of a batch have the same shape."""
    accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Forward passes per optimizer step."""
    precision: Literal["bf16_mixed", "bf16_pure", "fp32"] = "bf16_mixed"
    """bf16_mixed: float32 weights, bf16 math. bf16_pure: bf16 weights, with stochastic rounding. fp32: no half precision."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: far less memory, about a quarter more time."""
    clip_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    max_bad_steps: Annotated[int, Field(ge=1)] = 10
    """The run stops after this many steps in a row with a loss or gradient that is not finite. Such steps change no weight."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU if there is one."""


class EmaSection(Section):
    enabled: bool = True
    """Keep a float32 moving average of the weights; it is what gets sampled and exported."""
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9999
    """Share of the average that is kept at each step."""
    warmup: bool = True
    """Start with a short memory: decay min(decay, (1 + t) / (10 + t)), so that short runs profit too."""
    device: Literal["model", "cpu"] = "model"
    """Where the average lives. `cpu` saves 10 GB of GPU memory."""


class ValidationSection(Section):
    every: Every = Duration(500, "steps")
    """How often the loss on held-out pictures is measured. "never" turns it off; the first and last step are always measured."""
    share: Annotated[float, Field(ge=0.0, le=0.5)] = 0.02
    """Share of the pictures that is held out, chosen by content. 0 measures on pictures of the training set instead."""
    max_pictures: Annotated[int, Field(ge=1)] = 64
    """No more pictures than this are measured (and held out)."""
    timesteps: Annotated[int, Field(ge=1, le=100)] = 8
    """How many noise levels each picture is measured at; the terminal one is added with zero terminal SNR."""


class SamplesSection(Section):
    every: Every = Duration(500, "steps")
    """How often pictures are made from `prompts`. "never" turns it off."""
    prompts: tuple[str, ...] = ()
    """One picture is made of each."""
    negative_prompt: str | None = None
    """What to stay away from. Without it the unconditional input is zeros; with it, also with "", it is encoded text."""
    height: Annotated[int, Field(ge=32, multiple_of=32)] = 1024
    """Height of the pictures, in pixels."""
    width: Annotated[int, Field(ge=32, multiple_of=32)] = 1024
    """Width of the pictures, in pixels."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 28
    """Sampling steps (Euler, trailing timesteps)."""
    guidance_scale: Annotated[float, Field(ge=0.0)] = 5.0
    """Classifier-free guidance; 1 turns it off."""
    guidance_rescale: Share = 0.0
    """Pull the guided prediction back to the strength of the unguided one (arXiv 2305.08891); 0.7 suits zero terminal SNR."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The same noise is used at every event."""


class CheckpointsSection(Section):
    every: Duration = Duration(500, "steps")
    """How often the run is saved so that it can go on exactly. It is always saved at its end and on Ctrl-C."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many checkpoints stay; older ones of this run are removed after a newer one is safely on disk."""


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


class Config(Section):
    """A whole run. `aquatint init` writes a commented one."""

    run: RunSection = RunSection()
    """Name, place and seed of the run."""
    model: ModelSection
    """The model to start from, and what it predicts."""
    data: DataSection
    """Pictures and captions."""
    buckets: BucketsSection = BucketsSection()
    """Shapes in which pictures are trained."""
    crop: CropSection = CropSection()
    """How a picture is fitted to its bucket."""
    captions: CaptionsSection = CaptionsSection()
    """What becomes of captions."""
    cache: CacheSection = CacheSection()
    """Encoded pictures and captions on disk."""
    loader: LoaderSection = LoaderSection()
    """Reading batches ahead."""
    diffusion: DiffusionSection = DiffusionSection()
    """Noise levels and loss weights."""
    optimizer: Optimizer = AdamWSection()
    """The optimizer; each has its own settings."""
    lr: LearningRateSection = LearningRateSection()
    """The learning rate over time."""
    training: TrainingSection = TrainingSection()
    """Length, batch and precision."""
    ema: EmaSection = EmaSection()
    """Moving average of the weights."""
    validation: ValidationSection = ValidationSection()
    """Loss on pictures that are not trained."""
    samples: SamplesSection = SamplesSection()
    """Pictures made during the run."""
    checkpoints: CheckpointsSection = CheckpointsSection()
    """Saving, so that the run can go on."""
    export: ExportSection = ExportSection()
    """The finished model."""
    tracking: TrackingSection = TrackingSection()
    """Logs."""


class _SchemaGenerator(GenerateJsonSchema):
    def encode_default(self, dft: Any) -> Any:
        return str(dft) if isinstance(dft, Duration) else super().encode_default(dft)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a config, for editors and forms; every setting carries its help and default."""
    return {"$schema": GenerateJsonSchema.schema_dialect, **Config.model_json_schema(schema_generator=_SchemaGenerator)}


def dump(config: Config) -> dict[str, Any]:
    """The config as plain JSON values; `Config.model_validate` takes it back."""
    return config.model_dump(mode="json")
