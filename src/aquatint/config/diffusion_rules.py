"""Settings of the loss, the noise, the timesteps and the sampling that do not go together, whatever the base model is.

Those that depend on the base are in `training.process`.
"""

from __future__ import annotations

from collections.abc import Callable

from aquatint.config.rule import Rule
from aquatint.config.schema import Config
from aquatint.config.sections.methods import DiffusionSection, NoiseSection, TimestepsSection

Applies = Callable[[Config], bool]
Section = DiffusionSection | NoiseSection | TimestepsSection
NUM_TIMESTEPS = 1000

# setting -> the choices that it belongs to
WEIGHTING_SETTINGS = {
    "gamma": ("auto", "min_snr", "soft_min_snr", "clamped_v"),
    "weight_floor": ("auto", "min_snr", "soft_min_snr", "debiased", "p2", "like_epsilon"),
    "p2_k": ("p2",),
    "p2_gamma": ("p2",),
    "uncertainty_learning_rate": ("learned",),
    "adaptive_ranges": ("adaptive",),
    "adaptive_decay": ("adaptive",),
}
DENSITY_SETTINGS = {
    "mean": ("logit_normal", "log_normal"),
    "std": ("logit_normal", "log_normal"),
    "mode_scale": ("mode",),
    "shift": ("uniform", "logit_normal", "mode", "cosmap"),
}


def _changed(section: str, name: str) -> Applies:
    """Whether a setting is not what it is by default."""
    defaults: dict[str, Section] = {"diffusion": DiffusionSection(), "noise": NoiseSection(), "timesteps": TimestepsSection()}
    default = getattr(defaults[section], name)
    return lambda config: getattr(getattr(config, section), name) != default


def _idle(section: str, name: str, choice: str, owners: tuple[str, ...]) -> Rule:
    """A setting that belongs to other values of `choice` than the one that is set."""
    changed = _changed(section, name)
    wanted = " or ".join(f'"{owner}"' for owner in owners if owner != "auto")
    return Rule(
        (f"{section}.{name}", f"{section}.{choice}"),
        lambda c: changed(c) and getattr(getattr(c, section), choice) not in owners,
        f'`{section}.{name}` does nothing with `{section}.{choice} = "{{c.{section}.{choice}}}"`',
        f"it belongs to {wanted}: set that, or leave out `{section}.{name}`",
    )


def _has_masks(config: Config) -> bool:
    return any(source.masks != "none" or source.mask_column is not None for source in config.data.sources)


DIFFUSION_RULES = (
    # what the model predicts
    Rule(
        ("model.zero_terminal_snr", "model.prediction"),
        lambda c: c.model.zero_terminal_snr is True and c.model.prediction == "epsilon",
        "`model.zero_terminal_snr` cannot go with an epsilon model",
        "its last timestep is pure noise, and from that no picture can be worked out by predicting the noise: "
        'set `model.prediction = "v_prediction"`, or `model.zero_terminal_snr = false`',
    ),
    Rule(
        ("model.edm_sigmas",),
        lambda c: c.model.edm_sigmas is not None and c.model.edm_sigmas[0] >= c.model.edm_sigmas[1],
        "`model.edm_sigmas` must be the least noise and the most, in this order",
        "the noise rises from the first to the second: CosXL has [0.002, 120], Playground [0.002, 80]",
    ),
    Rule(
        ("model.edm_sigmas", "model.noise_levels"),
        lambda c: c.model.edm_sigmas is not None and c.model.noise_levels == "sdxl",
        '`model.edm_sigmas` does nothing with `model.noise_levels = "sdxl"`',
        'those levels are fixed: set `model.noise_levels = "edm"`, or leave out `model.edm_sigmas`',
    ),
    # loss
    *(_idle("diffusion", name, "weighting", owners) for name, owners in WEIGHTING_SETTINGS.items()),
    Rule(
        ("diffusion.normalise_weights", "diffusion.weighting"),
        lambda c: c.diffusion.normalise_weights and c.diffusion.weighting in ("none", "learned", "adaptive"),
        '`diffusion.normalise_weights` does nothing with `diffusion.weighting = "{c.diffusion.weighting}"`',
        "its weights have a mean of 1 or follow the loss: leave it out, or set another weighting",
    ),
    Rule(
        ("diffusion.adaptive_ranges",),
        lambda c: NUM_TIMESTEPS % c.diffusion.adaptive_ranges != 0,
        "`diffusion.adaptive_ranges = {c.diffusion.adaptive_ranges}` cannot cut 1000 timesteps into equal ranges",
        "all ranges must have the same number of timesteps: write 10, 20, 25, 50 or 100",
    ),
    *(_idle("diffusion", name, "loss", ("huber", "smooth_l1")) for name in ("huber_c", "huber_schedule", "huber_scale")),
    Rule(
        ("diffusion.mask_prior_weight", "data.sources"),
        lambda c: c.diffusion.mask_prior_weight > 0 and not _has_masks(c),
        "`diffusion.mask_prior_weight` does nothing without masks",
        'no source has any: set `masks = "files"` or `masks = "alpha"` in `[[data.sources]]`, or leave it out',
    ),
    Rule(
        ("diffusion.mask_prior_weight", "data.mask_floor"),
        lambda c: c.diffusion.mask_prior_weight > 0 and c.data.mask_floor > 0,
        "`diffusion.mask_prior_weight` and `data.mask_floor` say two things about what is outside of the masks",
        "it is either to stay as the base model draws it, or to be learned a little: keep one of the two",
    ),
    # noise
    Rule(
        ("noise.pyramid_levels", "noise.pyramid"),
        lambda c: _changed("noise", "pyramid_levels")(c) and c.noise.pyramid == 0,
        "`noise.pyramid_levels` does nothing with `noise.pyramid = 0`",
        "there is no pyramid noise: set `noise.pyramid = 0.3`, or leave it out",
    ),
    Rule(
        ("noise.immiscible", "training.batch_size"),
        lambda c: c.noise.immiscible and c.training.batch_size == 1,
        "`noise.immiscible` does nothing with `training.batch_size = 1`",
        "noises are exchanged between the pictures of a batch, and there is one: raise the batch size, or leave it out",
    ),
    # timesteps
    *(_idle("timesteps", name, "density", owners) for name, owners in DENSITY_SETTINGS.items()),
    Rule(
        ("timesteps.lowest", "timesteps.highest"),
        lambda c: c.timesteps.lowest > c.timesteps.highest,
        "`timesteps.lowest` ({c.timesteps.lowest}) is above `timesteps.highest` ({c.timesteps.highest})",
        "no timestep is left: swap them, or leave both out for 0 and 999",
    ),
    Rule(
        ("timesteps.uniform_share", "timesteps.density"),
        lambda c: (
            c.timesteps.uniform_share > 0
            and c.timesteps.density == "uniform"
            and c.timesteps.shift == 1
            and c.timesteps.resolution_noise != "tilt"
        ),
        '`timesteps.uniform_share` does nothing with `timesteps.density = "uniform"`',
        "all draws are uniform: set another density, or leave it out",
    ),
    Rule(
        ("timesteps.importance", "diffusion.weighting"),
        lambda c: c.timesteps.importance and c.diffusion.weighting in ("learned", "adaptive"),
        '`timesteps.importance` cannot go with `diffusion.weighting = "{c.diffusion.weighting}"`',
        "both follow the loss, and each would chase the other: keep one of them",
    ),
    Rule(
        ("timesteps.importance", "timesteps.resolution_noise"),
        lambda c: c.timesteps.importance and c.timesteps.resolution_noise == "tilt",
        '`timesteps.importance` cannot go with `timesteps.resolution_noise = "tilt"`',
        "one learns how often a level comes, the other sets it for each picture size: keep one of them",
    ),
    Rule(
        ("timesteps.importance_ranges", "timesteps.importance"),
        lambda c: not c.timesteps.importance and _changed("timesteps", "importance_ranges")(c),
        "`timesteps.importance_ranges` does nothing without `timesteps.importance`",
        "nothing keeps a record of losses: set `timesteps.importance = true`, or leave it out",
    ),
    Rule(
        ("timesteps.importance_ranges",),
        lambda c: NUM_TIMESTEPS % c.timesteps.importance_ranges != 0,
        "`timesteps.importance_ranges = {c.timesteps.importance_ranges}` cannot cut 1000 timesteps into equal ranges",
        "all ranges must have the same number of timesteps: write 10, 20, 25, 50 or 100",
    ),
    # samples
    Rule(
        ("samples.height", "samples.width"),
        lambda c: (c.samples.height is None) != (c.samples.width is None),
        "`samples.height` and `samples.width` go together",
        "a picture has both: set both, or leave both out for the shape that is trained most",
    ),
    Rule(
        ("samples.guidance_rescale", "samples.guidance_scale"),
        lambda c: c.samples.guidance_scale == 1 and c.samples.guidance_rescale > 0,
        "`samples.guidance_rescale` does nothing with `samples.guidance_scale = 1`",
        "1 turns guidance off, so there is nothing to pull back: set `samples.guidance_scale = 5`, or leave out `samples.guidance_rescale`",
    ),
    Rule(
        ("samples.negative_prompt", "samples.guidance_scale"),
        lambda c: c.samples.guidance_scale == 1 and bool(c.samples.negative_prompt),
        "`samples.negative_prompt` does nothing with `samples.guidance_scale = 1`",
        "1 turns guidance off: set `samples.guidance_scale = 5`, or leave out `samples.negative_prompt`",
    ),
    Rule(
        ("samples.weights", "ema.enabled"),
        lambda c: c.samples.weights == "raw" and not c.ema.enabled,
        '`samples.weights = "raw"` does nothing without an average',
        "there are no other weights to draw with: leave it out",
    ),
)
"""Contradictions: a config with one of them is refused."""

DIFFUSION_REMARKS = (
    Rule(
        ("noise.immiscible", "training.batch_size"),
        lambda c: c.noise.immiscible and c.training.batch_size != "auto" and 1 < c.training.batch_size < 8,
        "`noise.immiscible` does little with {c.training.batch_size} pictures a batch",
        "it chooses among the noises of a batch, and is worth its time from 8 on",
    ),
    Rule(
        ("timesteps.density", "timesteps.terminal_prob", "timesteps.uniform_share"),
        lambda c: (
            c.timesteps.density == "logit_normal"
            and c.timesteps.terminal_prob == 0
            and c.timesteps.uniform_share == 0
            and c.timesteps.shift <= 1
            and c.model.zero_terminal_snr is True
        ),
        "logit_normal almost never draws the last timesteps, where the sampling of this model begins",
        "set `timesteps.uniform_share = 0.1`, or leave out `timesteps.terminal_prob`",
    ),
    Rule(
        ("samples.height", "samples.width", "buckets.resolution"),
        lambda c: (
            bool(c.samples.prompts)
            and c.samples.height is not None
            and c.samples.width is not None
            and not 0.5 <= c.samples.height * c.samples.width / c.buckets.resolution**2 <= 2
        ),
        "samples of {c.samples.width}x{c.samples.height} are not of the size of the training pictures (`buckets.resolution`)",
        "a model draws best at the size that it is trained at",
    ),
    Rule(
        ("buckets.resolution", "timesteps.resolution_noise"),
        lambda c: c.buckets.resolution >= 1448 and c.timesteps.resolution_noise == "none" and c.timesteps.shift == 1,
        "pictures of {c.buckets.resolution} pixels show more through the same noise than SDXL's 1024",
        '`timesteps.resolution_noise = "tilt"` trains the higher noise that they need more often',
    ),
)
"""Worth a look, but allowed."""
