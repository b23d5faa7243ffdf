"""The config, as frozen values. The text under each field is its help, in `--help`, `init` and the reference page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.json_schema import GenerateJsonSchema

from aquatint.config.duration import Duration
from aquatint.config.sections.data import BucketsSection, CacheSection, CaptionsSection, CropSection, DataSection, LoaderSection
from aquatint.config.sections.fields import Every, Section
from aquatint.config.sections.looks import (
    CheckpointsSection,
    EvaluationSection,
    ExportSection,
    SamplesSection,
    TrackingSection,
    ValidationSection,
)
from aquatint.config.sections.memory import MemorySection
from aquatint.config.sections.methods import (
    AdapterSection,
    DiffusionSection,
    ModelSection,
    NoiseSection,
    TextEncodersSection,
    TimestepsSection,
)
from aquatint.config.sections.optimizers import AdamWSection, Optimizer
from aquatint.config.sections.speed import SpeedSection
from aquatint.config.sections.steps import EmaSection, LearningRateSection, TrainingSection


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
    text_encoders: TextEncodersSection = TextEncodersSection()
    """Training the text encoders too."""
    optimizer: Optimizer = AdamWSection()
    """The optimizer; each has its own settings."""
    lr: LearningRateSection = LearningRateSection()
    """The learning rate over time."""
    training: TrainingSection = TrainingSection()
    """Length, batch and precision."""
    speed: SpeedSection = SpeedSection()
    """How the UNet is computed. None of it changes what is learned but for rounding."""
    memory: MemorySection = MemorySection()
    """What lives where, and in how many bytes."""
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
