"""What the pictures of a config are called, and what to see in them, in words. A part of the composition root."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aquatint.config.schema import Config
from aquatint.config.sections.methods import NoiseSection, TimestepsSection
from aquatint.models.sdxl.load import BaseModel
from aquatint.planning.schedule import count
from aquatint.tracking.plots import Array, Draws, Grid, Levels, Memory, Weights
from aquatint.training.objectives import choose_process, chosen_weighting, sampling_steps

NOTABLE_SHARE = 1e-4


def schedule_words(levels: Levels) -> str:
    """What is left of the picture at the end."""
    alpha, sigma = levels.alphas[-1], levels.sigmas[-1]
    left = alpha**2 / (alpha**2 + sigma**2)
    rest = f"still has {100 * left:.2g} % of the picture's power, and sampling starts without it"
    return f"from an almost clean picture to noise; the last timestep {'is pure noise, where sampling starts' if left == 0 else rest}"


def weight_words(config: Config, weights: Weights) -> str:
    """What the noisiest and the cleanest timesteps get."""
    noisy, clean = (f"{weights.drawn_share[i]:.3g} % of the draws and {weights.weight_share[i]:.3g} % of the weight" for i in (-1, 0))
    later = {"learned": " at first; then what the loss teaches", "adaptive": " at first; then the inverse of the mean loss"}
    return f"timesteps 900 to 999 get {noisy}, 0 to 99 get {clean}{later.get(config.diffusion.weighting, '')}"


def draw_words(draws: Draws) -> str:
    """Where the middle of the draws lies, and how a step shares them out."""
    middle, last = int(np.searchsorted(np.cumsum(draws.density), 0.5)), int(np.flatnonzero(draws.density)[-1])
    alone = f"{100 * draws.density[last]:.2g} % at {last} alone"
    return f"half of the samples are below timestep {middle}, {alone}; the dots are what each step gets"


def grid_words(grid: Grid) -> str:
    """From where to where, and how many steps are spent on composition."""
    first, last = grid.ve_sigmas[[0, -1]]
    start = "pure noise" if np.isinf(first) else f"noise {first:,.4g} times as strong as the picture"
    noisy = int((grid.ve_sigmas > 1).sum())
    return f"from {start} down to {last:.3g}, then 0; {noisy} of {len(grid.timesteps)} steps have more noise than picture"


def memory_words(rates: Array, memories: Sequence[Memory], base_share: float) -> str:
    """The end of the run, in the rate and in the average."""
    last = rates[-1] if rates[-1] > NOTABLE_SHARE * rates.max() else 0
    end = f"{rates.max():.3g} at its peak, {last:.3g} at the end"
    if not memories:
        return f"{end}; no average is kept"
    if base_share > 0.5:
        return f"{end}; {100 * base_share:.2g} % of the average is still the base model then: its memory is too long for this run"
    left = f"{100 * base_share:.2g} % of it is still the base model" if base_share > NOTABLE_SHARE else "the base model has faded from it"
    return f"{end}; half of the average is from the last {memories[0].steps_back[-1]:,.0f} of {len(rates):,} steps, and {left}"


def loss_words(config: Config, base: BaseModel) -> str:
    """The loss and its weights."""
    section, process = config.diffusion, choose_process(config, base)
    weighting = chosen_weighting(config, process)
    words = [f"{section.loss} of {process.prediction}", f"weighting {weighting}"]
    words += [f"gamma {section.gamma:g}"] if weighting in ("min_snr", "soft_min_snr", "clamped_v") else []
    words += [f"k {section.p2_k:g}, gamma {section.p2_gamma:g}"] if weighting == "p2" else []
    words += ["brought to a mean of 1"] if section.normalise_weights else []
    return ", ".join(words)


def density_words(section: TimestepsSection, samples_per_step: int) -> str:
    """How timesteps are drawn."""
    numbers = {"logit_normal": f" ({section.mean:g}, {section.std:g})", "log_normal": f" ({section.mean:g}, {section.std:g})"}
    words = [section.density + numbers.get(section.density, f" ({section.mode_scale:g})" if section.density == "mode" else "")]
    words += [f"shift {section.shift:g}"] if section.shift != 1 else []
    words += [f"{section.lowest} to {section.highest}"] if (section.lowest, section.highest) != (0, 999) else []
    words += [f"{100 * section.uniform_share:g} % of them uniform"] if section.uniform_share else []
    words += [f"{section.resolution_noise} by picture size"] if section.resolution_noise != "none" else []
    words += ["then moved to where the loss is large"] if section.importance else []
    return f"{', '.join(words)}; {section.spread}, {count(samples_per_step, 'sample')} a step"


def noise_words(section: NoiseSection) -> str:
    """What is added to plain noise."""
    parts = [f"offset {section.offset:g}"] if section.offset else []
    parts += [f"pyramid {section.pyramid:g} in {section.pyramid_levels} levels"] if section.pyramid else []
    return ", ".join(parts)


def sampling_words(config: Config, base: BaseModel) -> str:
    """How sample pictures are drawn."""
    section, steps = config.samples, sampling_steps(config, choose_process(config, base))
    shift = f", shift {section.shift:g}" if section.shift != 1 else ""
    start = f", starting as {section.sigma_max} does" if section.sigma_max != "exact" else ""
    return f"{steps.sampler}, {steps.num_steps} steps, {steps.grid}{shift}{start}, guidance {steps.guidance_scale:g}"


def rate_words(config: Config) -> str:
    """The learning rate over time."""
    section = config.lr
    end = f" to {100 * section.end_factor:g} %" if section.schedule != "constant" else ""
    warmup = f", rising for {section.warmup}" if section.warmup.value else ""
    return f"{config.optimizer.name}, {section.schedule}{end}{warmup}, {config.training.length} in all"
