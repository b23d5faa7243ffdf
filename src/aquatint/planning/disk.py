"""What a run writes to disk, from the config and the shapes alone."""

from __future__ import annotations

from math import ceil, prod

from aquatint.config.check import renders_online
from aquatint.config.schema import Config
from aquatint.models.sdxl.model import ModelSpec
from aquatint.models.sdxl.shapes import COMPONENTS
from aquatint.planning.memory import DTYPE_BYTES, Part, gib, state_parts
from aquatint.planning.schedule import StepPlan, count
from aquatint.planning.shapes import largest_bucket
from aquatint.planning.trace import PX_PER_LATENT, TOKENS
from aquatint.planning.trained import num_trained, trained_encoders


def checkpoint_bytes(config: Config, spec: ModelSpec) -> int:
    """One checkpoint: weights, optimizer state and moving average as they are in memory."""
    return sum(part.bytes for part in state_parts(config, spec))


def export_bytes(config: Config, spec: ModelSpec) -> int:
    """One exported model. The parts that are not trained are taken as float16, which most bases are."""
    trained = ("unet", *trained_encoders(config))
    dtypes = {component: config.export.dtype if component in trained else "float16" for component in COMPONENTS}
    return sum(spec.num_parameters(component) * DTYPE_BYTES[dtype] for component, dtype in dtypes.items())


def exported_part(config: Config, spec: ModelSpec) -> Part:
    """Everything that is exported at the end of a run: models, or the files of an adapter, with models if it is merged too."""
    section = config.export
    models = section.single_file + section.diffusers_folder
    if config.adapter.kind == "none":
        return Part("exported model", export_bytes(config, spec) * models, section.dtype)
    files = num_trained(config, spec) * DTYPE_BYTES[section.dtype] * len(section.lora_names)
    return Part("exported adapter", files + export_bytes(config, spec) * models * section.merged, section.dtype)


def vae_checkpoint_bytes(spec: ModelSpec) -> int:
    """One checkpoint of `train-vae`: the decoder's weights, two moments and average in float32. A discriminator is too small to count."""
    trained = sum(prod(shape) for name, shape in spec.shapes("vae").items() if name.startswith(("decoder.", "post_quant_conv.")))
    return 4 * trained * DTYPE_BYTES["float32"]


def vae_export_bytes(config: Config, spec: ModelSpec) -> int:
    """What `train-vae` exports: the autoencoder alone, and a whole model with it if that is asked for."""
    return spec.num_parameters("vae") * DTYPE_BYTES[config.export.dtype] + export_bytes(config, spec) * config.export.single_file


def views_per_picture(config: Config) -> int:
    """How many latents of a picture are cached: crops, and their mirror images."""
    return (config.crop.variants if config.crop.mode == "random" else 1) * (2 if config.crop.flip_prob > 0 else 1)


def cache_bytes_per_picture(config: Config, spec: ModelSpec) -> int:
    """The cached views and captions of one picture in the largest bucket, captions of one chunk."""
    height, width = largest_bucket(config)
    sides = (height // PX_PER_LATENT, width // PX_PER_LATENT)
    latent: int = 2 * prod((spec.unet["in_channels"], *sides)) * DTYPE_BYTES[config.cache.latent_dtype]
    text: int = TOKENS * spec.unet["cross_attention_dim"] + spec.text_encoder_2["projection_dim"]
    texts = 0 if renders_online(config) else config.captions.variants
    return views_per_picture(config) * latent + texts * text * DTYPE_BYTES[config.cache.text_dtype]


def snapshot_bytes(config: Config, spec: ModelSpec) -> int:
    """One snapshot of the power averages: of whole weights what changed, of an adapter all of it."""
    dtype = "float16" if config.adapter.kind == "none" else "float32"
    return num_trained(config, spec) * DTYPE_BYTES[dtype] * len(config.ema.power_stds)


def num_snapshots(config: Config, steps: StepPlan) -> int:
    """How often the power averages are written: at every multiple, and at the end."""
    lengths = {"samples_per_step": steps.samples_per_step, "samples_per_epoch": steps.samples_per_epoch}
    times = ceil(steps.samples / config.ema.snapshot_every.in_samples(**lengths))
    return min(steps.steps, times) if config.ema.power_stds else 0


def plan_disk(config: Config, spec: ModelSpec, num_pictures: int, steps: StepPlan | None = None) -> tuple[Part, ...]:
    """What ends up on disk, checkpoints counted with the one that is being written before an old one goes.

    Without `steps`, which say how many there are, snapshots of averages are left out.
    """
    one, keep = checkpoint_bytes(config, spec), config.checkpoints.keep + config.checkpoints.keep_best
    snapshots, each = num_snapshots(config, steps) if steps else 0, snapshot_bytes(config, spec)
    averages = (Part("averages to choose from", each * snapshots, f"{count(snapshots, 'snapshot')} of {gib(each)}"),) if snapshots else ()
    return (
        Part("checkpoints", one * (keep + 1), f"{gib(one)} each, {keep} kept and one more while it is written"),
        *averages,
        exported_part(config, spec),
        Part("cache", cache_bytes_per_picture(config, spec) * num_pictures, f"at most, for {num_pictures:,} pictures not encoded before"),
    )
