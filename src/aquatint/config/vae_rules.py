"""Settings of `vae_training` that do not go together. They are refused by `train` too: a config is right as a whole."""

from __future__ import annotations

from collections.abc import Callable

from aquatint.config.duration import Duration
from aquatint.config.rule import Rule
from aquatint.config.schema import Config, VaeTrainingSection


def _value(config: Config, name: str) -> Duration | None:
    value: Duration | None = getattr(config.vae_training, name)
    return value


def _is_zero(name: str) -> Callable[[Config], bool]:
    return lambda config: (value := _value(config, name)) is not None and value.value == 0


def _is_time(name: str) -> Callable[[Config], bool]:
    return lambda config: (value := _value(config, name)) is not None and value.unit == "seconds"


def _reaches(config: Config, name: str) -> bool:
    """Whether a duration is as long as the whole training, as far as that is known without counting the pictures."""
    section = config.vae_training
    one: Duration = getattr(section, name)
    if one.unit == section.length.unit:
        return one.value >= section.length.value > 0
    samples = {"steps": section.batch_size, "samples": 1}
    first, last = (value.value * samples.get(value.unit, 0) for value in (one, section.length))
    return first >= last > 0


VAE_RULES = (
    *(
        Rule(
            (f"vae_training.{name}",),
            _is_zero(name),
            f"`vae_training.{name}` is zero",
            'zero steps never pass: write a length, such as "500 steps"',
        )
        for name in ("length", "validation_every", "samples_every", "checkpoints_every")
    ),
    *(
        Rule(
            (f"vae_training.{name}",),
            _is_time(name),
            f"`vae_training.{name}` cannot be a time",
            'a run should be the same on any machine: count in steps or epochs, such as "500 steps"',
        )
        for name in ("length", "warmup", "adversarial_start", "validation_every")
    ),
    Rule(
        ("vae_training.warmup", "vae_training.length", "vae_training.batch_size"),
        lambda c: _reaches(c, "warmup"),
        '`vae_training.warmup` ("{c.vae_training.warmup}") is as long as `vae_training.length` ("{c.vae_training.length}")',
        "the learning rate would never stay at its peak: a twentieth of the length is plenty",
    ),
    Rule(
        ("vae_training.l1_weight", "vae_training.mse_weight", "vae_training.perceptual_weight"),
        lambda c: c.vae_training.l1_weight == c.vae_training.mse_weight == c.vae_training.perceptual_weight == 0,
        "`vae_training.l1_weight`, `mse_weight` and `perceptual_weight` are all 0",
        "nothing would tell the decoder what the picture was: set `vae_training.l1_weight = 1`",
    ),
    Rule(
        ("vae_training.perceptual_weight", "vae_training.perceptual_model"),
        lambda c: c.vae_training.perceptual_weight > 0 and c.vae_training.perceptual_model is None,
        "`vae_training.perceptual_weight` needs `vae_training.perceptual_model`",
        "the perceptual difference is measured with VGG16, which does not come with aquatint: name its `.safetensors` file "
        "(docs/vae.md says how to make it), or set `vae_training.perceptual_weight = 0`",
    ),
    Rule(
        ("vae_training.perceptual_model", "vae_training.perceptual_weight"),
        lambda c: c.vae_training.perceptual_model is not None and c.vae_training.perceptual_weight == 0,
        "`vae_training.perceptual_model` does nothing with `vae_training.perceptual_weight = 0`",
        "it would not be looked at: set `vae_training.perceptual_weight = 1`, or leave out the file",
    ),
    Rule(
        ("vae_training.adversarial_start", "vae_training.adversarial_weight"),
        lambda c: c.vae_training.adversarial_weight == 0 and c.vae_training.adversarial_start != VaeTrainingSection().adversarial_start,
        "`vae_training.adversarial_start` does nothing with `vae_training.adversarial_weight = 0`",
        "there is no discriminator: set `vae_training.adversarial_weight = 0.5`, or leave out the start",
    ),
    Rule(
        ("vae_training.adversarial_start", "vae_training.adversarial_weight", "vae_training.length", "vae_training.batch_size"),
        lambda c: c.vae_training.adversarial_weight > 0 and _reaches(c, "adversarial_start"),
        '`vae_training.adversarial_start` ("{c.vae_training.adversarial_start}") is not before the end ("{c.vae_training.length}")',
        "the discriminator would never join in: start it in the first half, or set `vae_training.adversarial_weight = 0`",
    ),
)
"""Contradictions: a config with one of them is refused."""
