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
PowerStds = Annotated[
    tuple[Annotated[float, Field(ge=0.01, le=0.25)], ...],
    Field(json_schema_extra={"expected": "a list of numbers from 0.01 to 0.25, such as [0.05, 0.1]"}),
]
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
    prediction: Literal["auto", "epsilon", "v_prediction", "x0", "edm", "flow"] = "auto"
    """What the UNet predicts. `auto` keeps what the base model was trained for; see docs/diffusion.md for the others."""
    zero_terminal_snr: Literal["auto"] | bool = "auto"
    """Whether the last timestep is pure noise (arXiv 2305.08891). Needs v_prediction or x0. `auto` keeps the base's own."""
    noise_levels: Literal["auto", "sdxl", "edm"] = "auto"
    """`sdxl`: its 1000 timesteps. `edm`: even in the logarithm of the noise, which the UNet is told (CosXL, Playground)."""
    edm_sigmas: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0, le=1e5)]] | None = None
    """Least and most noise of `noise_levels = "edm"`; the base's own if not set, or else 0.002 and 80."""
    retarget: bool = False
    """Go on although the base says that it was made for another prediction: it has to learn anew, for thousands of steps."""
    standardise_latents: bool = False
    """Train on latents with mean 0 and deviation 1 per channel; exports carry that in their own autoencoder. For long runs only."""


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
    weighting: Literal[
        "auto", "none", "min_snr", "soft_min_snr", "clamped_v", "truncated", "debiased", "p2", "cosmap", "sigma_sqrt", "like_epsilon",
        "like_v", "learned", "adaptive",
    ] = "auto"  # fmt: skip
    """Loss weight by noise level. `auto` is clamped_v with zero terminal SNR, and none without."""
    gamma: Annotated[float, Field(gt=0.0)] = 5.0
    """Where min_snr (arXiv 2303.09556), soft_min_snr and clamped_v stop to grow with the SNR."""
    weight_floor: Share = 0.05
    """Least weight of any timestep, where a weighting gives 0 to pure noise, which then would never be trained."""
    p2_k: Annotated[float, Field(gt=0.0)] = 1.0
    """k of p2: SNR / (k + SNR)^gamma on the error of the picture (arXiv 2204.00227)."""
    p2_gamma: Annotated[float, Field(ge=0.0, le=4.0)] = 1.0
    """gamma of p2."""
    normalise_weights: bool = False
    """Scale the weights to a mean of 1 over the timesteps that are drawn, so that learning rates compare between weightings."""
    uncertainty_learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-2
    """Learning rate of the 128 numbers that `weighting = "learned"` learns (arXiv 2312.02696)."""
    adaptive_ranges: Annotated[int, Field(ge=1, le=1000)] = 20
    """Ranges of timesteps that `weighting = "adaptive"` keeps a mean loss of. Must divide 1000."""
    adaptive_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    """Share of a range's mean loss that is kept at each sample in it."""
    loss: Literal["mse", "huber", "smooth_l1"] = "mse"
    """What is made of the difference. `huber` and `smooth_l1` forgive outliers (arXiv 2403.16728)."""
    huber_c: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Where huber and smooth_l1 bend, at the last timestep."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How that changes from 1 at the first timestep to `huber_c` at the last; `constant` is `huber_c` at all."""
    huber_scale: Annotated[float, Field(gt=0.0)] = 1.0
    """Multiplies it at every timestep."""
    mask_prior_weight: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """Outside of the masks, stay with what the base model predicts, this strongly. Keeps the base in memory a second time."""


class NoiseSection(Section):
    offset: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Offset noise: so strong a shift of whole channels. 0.0357 is common, 0.05 is SDXL's own last stage."""
    offset_slope: Annotated[float, Field(ge=-10.0, le=10.0)] = 0.0
    """Added to `offset` for each unit that a channel's mean differs from 0."""
    pyramid: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Pyramid noise: so much of each next, coarser level. 0.3 is common."""
    pyramid_levels: Annotated[int, Field(ge=1, le=10)] = 6
    """Most levels of pyramid noise."""
    input_perturbation: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Noise the input so much more than the target says (arXiv 2301.11706). 0.1 is the paper's."""
    immiscible: bool = False
    """In each batch, give each picture the noise that suits it best (arXiv 2406.12303). Does little below 8 pictures a batch."""


class TimestepsSection(Section):
    density: Literal["uniform", "logit_normal", "mode", "cosmap", "log_normal", "cosine"] = "uniform"
    """How often each noise level is trained: over the timestep, or, for log_normal and cosine, over the noise itself."""
    mean: Annotated[float, Field(ge=-10.0, le=10.0)] = 0.0
    """Centre of logit_normal (of the timestep's logit) or log_normal (of the noise's logarithm; EDM: -1.2, EDM2: -0.4)."""
    std: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    """Width of logit_normal or log_normal."""
    mode_scale: Annotated[float, Field(ge=-1.0, le=1.75)] = 1.29
    """Of `mode` (arXiv 2403.03206)."""
    shift: Annotated[float, Field(ge=0.01, le=100.0)] = 1.0
    """Draw noise so many times as strong (arXiv 2403.03206, equation 23). For the densities over the timestep."""
    resolution_noise: Literal["none", "tilt", "reindex"] = "none"
    """Larger pictures need more noise. `tilt` trains it more often; `reindex` redefines timesteps, which no other program knows."""
    lowest: Annotated[int, Field(ge=0, le=999)] = 0
    """First timestep that is trained."""
    highest: Annotated[int, Field(ge=0, le=999)] = 999
    """Last timestep that is trained."""
    uniform_share: Share = 0.0
    """Share of the draws that are uniform all the same, so that no level starves."""
    terminal_prob: Literal["auto"] | Share = "auto"
    """Share of the draws at `highest`, beside the density's own. `auto`: 0.01 with zero terminal SNR, 0 without."""
    spread: Literal["strata", "lattice", "independent"] = "strata"
    """How the samples of an optimizer step share out the levels: one in each part, equally far apart, or by chance."""
    importance: bool = False
    """Draw levels with a large loss more often and weigh them less (arXiv 2102.09672): less noise in the gradient, the same mean."""
    importance_ranges: Annotated[int, Field(ge=1, le=1000)] = 50
    """Ranges of timesteps that share a record of their losses. Must divide 1000."""


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
    """AdamW for bf16 weights: float32 math, weights and moments rounded so that nothing is lost (6 bytes a parameter in all)."""
    rounding: Literal["stochastic", "kahan"] = "stochastic"
    """Of the weights. `kahan` rounds to the nearest and keeps what that leaves, for 2 more bytes a parameter: far less noise."""
    learning_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-5
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay; norms and biases are left out."""
    kernel: Literal["auto", "none"] = "auto"
    """`auto` updates a tensor with one Triton kernel on a GPU, where Triton is installed; `none` with plain torch. Same bits."""


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


class AdamW8bitSection(Section):
    name: Literal["adamw8bit"]
    """AdamW with moments of 8 bits (arXiv 2110.02861), for float32 or bf16 weights (4 bytes a parameter in all with bf16)."""
    learning_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-5
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay; norms and biases are left out."""
    kernel: Literal["auto", "none"] = "auto"
    """`auto` updates a tensor with one Triton kernel on a GPU, where Triton is installed; `none` with plain torch. Same bits."""


class SoapSection(Section):
    name: Literal["soap"]
    """SOAP (arXiv 2409.11321): Adam in a rotated basis. Large state and much arithmetic; for large batches."""
    learning_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-5
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.95, 0.95)
    """Decay of the first and second moment; the second is that of the bases too."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay; norms and biases are left out."""
    max_precond_dim: Annotated[int, Field(ge=0)] = 1280
    """Longest side of a matrix that is rotated. On SDXL, 1280 takes 13 GiB beside the moments, 2048 takes 18, 10240 takes 83."""
    precond_every: Annotated[int, Field(ge=1)] = 10
    """Steps between two refreshes of a tensor's bases; tensors take turns."""


class AdapterSection(Section):
    kind: Literal["none", "lora", "dora"] = "none"
    """Train small matrices beside the frozen UNet: LoRA (arXiv 2106.09685), or DoRA (arXiv 2402.09353). `none` trains the UNet itself."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """How many directions each layer can learn. Files and memory grow with it."""
    alpha: Annotated[float, Field(gt=0.0, le=4096.0)] | None = None
    """What is learned counts alpha / rank times. As large as the rank if not set, which makes that 1."""
    rslora: bool = False
    """alpha / sqrt(rank) instead (arXiv 2312.03732), so that a learning rate suits every rank. Files tell programs an alpha that fits."""
    targets: Literal["attention", "transformer", "all"] = "transformer"
    """`attention` alone; `transformer`: every linear layer of the transformers, as sd-scripts does; `all`: convolutions too (LoCon)."""
    start_from: Path | None = None
    """Go on from this LoRA, in kohya's or diffusers' names, instead of from nothing. Its rank, layers and kind must be those set here."""


def _optimizer_name(value: Any) -> Any:
    return value.get("name", "adamw") if isinstance(value, dict) else getattr(value, "name", None)


Optimizer = Annotated[
    Annotated[AdamWSection, Tag("adamw")]
    | Annotated[AdamWBF16Section, Tag("adamw_bf16")]
    | Annotated[AdamW8bitSection, Tag("adamw8bit")]
    | Annotated[AdafactorSection, Tag("adafactor")]
    | Annotated[SoapSection, Tag("soap")],
    Discriminator(_optimizer_name),
]


class LearningRateSection(Section):
    schedule: Literal["constant", "cosine", "linear", "inverse_sqrt"] = "constant"
    """Shape of the learning rate after the warm-up. `inverse_sqrt` needs no end: a long run can be stopped or made longer at will."""
    reference: Duration = Duration(1000, "steps")
    """Where inverse_sqrt begins to fall: from there on it is the peak times sqrt(reference / time)."""
    warmup: Duration = Duration(0, "steps")
    """How long the learning rate takes to rise to its peak."""
    end_factor: Share = 0.0
    """Where cosine and linear end, as a share of the peak."""


class GroupSection(Section):
    match: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    """Names of blocks, layers or tensors, with `*` for any text: "down_blocks.0", "*.attn2". docs/groups.md has a list."""
    learning_rate_factor: Annotated[float, Field(ge=0.0, le=1000.0)] = 1.0
    """Times `optimizer.learning_rate`; 0 freezes."""
    weight_decay: Annotated[float, Field(ge=0.0)] | None = None
    """Instead of `optimizer.weight_decay`; norms and biases are left out."""


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
    """Largest norm of the gradient; 0 does not clip."""
    clip: Literal["global", "per_tensor", "delayed"] = "global"
    """Of the whole gradient, or of each tensor's; `delayed` goes by the whole norm of the step before, and leaves the first one."""
    fused_backward: bool = False
    """Step each tensor in the backward pass and free its gradient: 4 GB less. A gradient that is not finite then comes too late for some."""
    groups: tuple[GroupSection, ...] = ()
    """Parts with a learning rate of their own, or frozen: one `[[training.groups]]` table each. The first that fits a tensor counts."""
    max_bad_steps: Annotated[int, Field(ge=1)] = 10
    """The run stops after this many steps in a row with a loss or gradient that is not finite. Such steps change no weight."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU if there is one."""
    dry_step: Literal["auto"] | bool = "auto"
    """Try the largest batch before the first step, without changing anything, so that what does not fit fails at once. `auto`: on a GPU."""


class EmaSection(Section):
    enabled: bool = True
    """Keep a float32 moving average of the weights; it is what gets sampled and exported."""
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9999
    """Share of the average that is kept at each step."""
    half_life: Duration | None = None
    """Or: after so much training, weights count half as much in the average, such as "20000 samples", whatever the batch."""
    warmup: bool = True
    """Start with a short memory: decay min(decay, (1 + t) / (10 + t)), so that short runs profit too."""
    device: Literal["model", "cpu"] = "model"
    """Where the averages live. `cpu` saves 10 GB of GPU memory for each."""
    power_stds: PowerStds = ()
    """Keep further averages, each over this share of the run so far (arXiv 2312.02696); `aquatint ema` makes others of them afterwards."""
    snapshot_every: Duration = Duration(1000, "steps")
    """How often those are written to the run's `ema` folder, and at its end: 5 GB each time for each of `power_stds`."""


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


class VaeTrainingSection(Section):
    length: Duration = Duration(2000, "steps")
    """When `aquatint train-vae` ends, counted from its beginning, also after a resume."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """Crops per step."""
    resolution: Annotated[int, Field(ge=32, multiple_of=32)] = 256
    """Side of the square crops, in pixels. Pictures with a shorter side than this are left out: nothing is enlarged."""
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-5
    """Learning rate of the decoder (AdamW without weight decay), and of the discriminator."""
    warmup: Duration = Duration(100, "steps")
    """How long the learning rate takes to rise to that."""
    precision: Literal["bf16_mixed", "fp32"] = "bf16_mixed"
    """bf16_mixed: float32 weights, bf16 math. fp32: no half precision."""
    l1_weight: Annotated[float, Field(ge=0.0, le=1000.0)] = 1.0
    """Weight of the mean absolute difference, of values from -1 to 1."""
    mse_weight: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.0
    """Weight of the mean squared difference."""
    perceptual_model: Path | None = None
    """VGG16's weights as a `.safetensors` file; docs/vae.md says how to make it."""
    perceptual_weight: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.0
    """Weight of the perceptual difference (LPIPS, arXiv 1801.03924), which keeps texture crisp. Needs `perceptual_model`; 1 is usual."""
    adversarial_weight: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.0
    """Weight of a discriminator that is trained along (arXiv 2012.09841). It brings detail, and can invent some; 0.5 is usual."""
    adversarial_start: Duration = Duration(500, "steps")
    """When the discriminator joins in."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Share of the decoder's moving average that is kept at each step. The average is what is exported."""
    validation_every: Every = Duration(500, "steps")
    """How often held-out pictures are measured. "never" leaves the first and the last step."""
    samples_every: Every = Duration(500, "steps")
    """How often a sheet of held-out pictures is made: the original, decoded as before, decoded as now."""
    checkpoints_every: Duration = Duration(500, "steps")
    """How often it is saved so that it can go on exactly. It is always saved at its end and on Ctrl-C."""


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
    """The loss and its weights."""
    noise: NoiseSection = NoiseSection()
    """What the noise is like."""
    timesteps: TimestepsSection = TimestepsSection()
    """How often each noise level is trained."""
    adapter: AdapterSection = AdapterSection()
    """Training a LoRA instead of the whole UNet."""
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
    evaluation: EvaluationSection = EvaluationSection()
    """How good the pictures of a model are: `aquatint evaluate`, with encoders of yours."""
    checkpoints: CheckpointsSection = CheckpointsSection()
    """Saving, so that the run can go on."""
    export: ExportSection = ExportSection()
    """The finished model."""
    tracking: TrackingSection = TrackingSection()
    """Logs."""
    vae_training: VaeTrainingSection = VaeTrainingSection()
    """Training the autoencoder's decoder, which is a run of its own: `aquatint train-vae`."""


class _SchemaGenerator(GenerateJsonSchema):
    def encode_default(self, dft: Any) -> Any:
        return str(dft) if isinstance(dft, Duration) else super().encode_default(dft)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a config, for editors and forms; every setting carries its help and default."""
    return {"$schema": GenerateJsonSchema.schema_dialect, **Config.model_json_schema(schema_generator=_SchemaGenerator)}


def dump(config: Config) -> dict[str, Any]:
    """The config as plain JSON values; `Config.model_validate` takes it back."""
    return config.model_dump(mode="json")
