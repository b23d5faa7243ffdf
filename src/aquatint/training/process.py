"""Which diffusion process a run trains: what the config asks for, held against what the base model is. Imports no torch.

A file that says what it is made for is believed: to train it as something else must be asked for. What goes together only with some
processes is listed here; what never goes together is in `config.check`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from aquatint.config.schema import Config
from aquatint.models.sdxl.load import BaseModel
from aquatint.models.sdxl.process import EDM_VE_SIGMAS, SDXL_SCALING, STANDARDISED, Process

ZERO_AT_PURE_NOISE = ("min_snr", "soft_min_snr", "debiased", "p2", "like_epsilon")  # weightings


@dataclass(frozen=True)
class Conflict:
    """Why a run cannot be: the setting to change first, what is wrong, and what to write instead."""

    key: str
    message: str
    hint: str


def wanted_process(config: Config, base: BaseModel) -> Process:
    """The process that the run trains, with everything that is `auto` taken from the base."""
    section, own = config.model, base.process
    prediction = own.prediction if section.prediction == "auto" else section.prediction
    levels = section.noise_levels
    if levels == "auto":
        keeps = own.edm_ve_sigmas is not None and prediction in ("v_prediction", "edm")
        levels = "edm" if keeps or prediction == "edm" else "sdxl"
    sigmas = (section.edm_sigmas or own.edm_ve_sigmas or EDM_VE_SIGMAS) if levels == "edm" and prediction != "flow" else None
    terminal = section.zero_terminal_snr
    if terminal == "auto":
        terminal = own.zero_terminal_snr and prediction not in ("epsilon", "flow") and sigmas is None
    latents = STANDARDISED if section.standardise_latents else own.latents
    return Process(prediction, terminal, sigmas, latents, own.folded, declared=True)


def conflicts(config: Config, base: BaseModel) -> Iterator[Conflict]:
    """What of the config cannot go with the base, or with the process that they make together."""
    process, own, name = wanted_process(config, base), base.process, base.path.name
    if own.declared and not config.model.retarget:
        if process.prediction != own.prediction:
            yield Conflict(
                "model.prediction",
                f'`model.prediction = "{process.prediction}"`, but {name} was trained for {own.prediction}',
                "its pictures would turn into noise: leave out `model.prediction`, or set `model.retarget = true` to let it learn anew",
            )
        elif (process.edm_ve_sigmas is None) != (own.edm_ve_sigmas is None):
            yield Conflict(
                "model.noise_levels",
                f"`model.noise_levels` asks for other noise levels than those of {name} ({own.words()})",
                "its pictures would turn into noise: leave it out, or set `model.retarget = true` to let it learn anew",
            )
    if config.model.standardise_latents and (own.folded or own.latents != SDXL_SCALING):
        yield Conflict(
            "model.standardise_latents",
            f"the latents of {name} are standardised already",
            "standardised twice they would be wrong: leave out `model.standardise_latents`",
        )
    for rule in PROCESS_RULES:
        if rule.applies(config, process):
            yield Conflict(rule.keys[0], rule.message.format(c=config, p=process, name=name), rule.hint)


def remarks(config: Config, base: BaseModel) -> Iterator[str]:
    """What is worth knowing about the process, and allowed."""
    process, own, name = wanted_process(config, base), base.process, base.path.name
    if process.prediction != own.prediction:
        was = "was trained for" if own.declared else "does not say what it predicts, so it is taken for"
        yield (
            f"{name} {was} {own.prediction} and will be retrained for {process.prediction}: "
            "its pictures will be broken at first, and need thousands of steps to recover"
        )
    if own.zero_terminal_snr and not process.zero_terminal_snr and process.prediction != "flow":
        yield f"{name} was trained with zero terminal SNR, which the config turns off"
    weighting, floor = config.diffusion.weighting, config.diffusion.weight_floor
    if weighting in ZERO_AT_PURE_NOISE and (process.zero_terminal_snr or process.prediction == "flow"):
        yield (
            f"{weighting} gives the last timestep, pure noise, the weight 0, and it would never be trained: "
            + (f"it gets `diffusion.weight_floor = {floor:g}` instead; " if floor else "raise `diffusion.weight_floor`; ")
            + '`diffusion.weighting = "clamped_v"` keeps it at its full weight'
        )
    if process.zero_terminal_snr and config.timesteps.highest < 999:
        yield "`timesteps.highest` leaves out the last timestep, pure noise, which zero terminal SNR is about"
    if config.timesteps.resolution_noise == "reindex":
        yield (
            '`timesteps.resolution_noise = "reindex"` gives timesteps another noise at each picture size, which ComfyUI, A1111 and Forge '
            'cannot be told: "tilt" trains the same noise under timesteps that they know'
        )
    if process.prediction == "flow" or (process.prediction == "edm" and process.latents == SDXL_SCALING) or process.prediction == "x0":
        yield "no program finds out by itself how to sample this model: the exported file's usage_hint says what to set up"


@dataclass(frozen=True)
class ProcessRule:
    """As `config.check.Rule`, about settings and the process together."""

    keys: tuple[str, ...]
    applies: Callable[[Config, Process], bool]
    message: str
    hint: str


def _ends_in_noise(process: Process) -> bool:
    return process.zero_terminal_snr or process.prediction == "flow"


PROCESS_RULES = (
    ProcessRule(
        ("model.zero_terminal_snr", "model.prediction"),
        lambda c, p: p.zero_terminal_snr and p.prediction == "epsilon" and c.model.prediction == "auto",
        "`model.zero_terminal_snr` cannot go with {name}, which is trained for epsilon",
        "its last timestep is pure noise, and from that no picture can be worked out by predicting the noise: "
        'set `model.prediction = "v_prediction"` to retrain it, or leave out `model.zero_terminal_snr`',
    ),
    ProcessRule(
        ("model.zero_terminal_snr", "model.prediction"),
        lambda c, p: p.zero_terminal_snr and (p.prediction == "flow" or p.edm_ve_sigmas is not None),
        "`model.zero_terminal_snr` is about SDXL's timesteps, and this model has others",
        "a flow ends in pure noise anyway, and EDM noise levels never do: leave it out",
    ),
    ProcessRule(
        ("model.noise_levels", "model.prediction"),
        lambda c, p: c.model.noise_levels == "edm" and p.prediction not in ("v_prediction", "edm"),
        '`model.noise_levels = "edm"` cannot go with {p.prediction}',
        'no program samples that: set `model.prediction = "v_prediction"` or `"edm"`, or leave out `model.noise_levels`',
    ),
    ProcessRule(
        ("model.noise_levels", "model.prediction"),
        lambda c, p: p.prediction == "edm" and p.edm_ve_sigmas is None,
        '`model.prediction = "edm"` goes with EDM noise levels alone',
        "an EDM model is told its noise, not a timestep: leave out `model.noise_levels`",
    ),
    ProcessRule(
        ("model.edm_sigmas", "model.noise_levels"),
        lambda c, p: c.model.edm_sigmas is not None and p.edm_ve_sigmas is None,
        "`model.edm_sigmas` does nothing at SDXL's own noise levels",
        'set `model.noise_levels = "edm"`, or leave it out',
    ),
    ProcessRule(
        ("noise.offset", "model.zero_terminal_snr"),
        lambda c, p: _ends_in_noise(p) and (c.noise.offset > 0 or c.noise.offset_slope != 0),
        "`noise.offset` cannot go with a model that ends in pure noise",
        "sampling starts from plain noise, whose channel means are six times smaller than what the model would then know; "
        "and such a model learns dark and bright pictures without it: leave it out",
    ),
    ProcessRule(
        ("noise.pyramid", "model.zero_terminal_snr"),
        lambda c, p: _ends_in_noise(p) and c.noise.pyramid > 0,
        "`noise.pyramid` cannot go with a model that ends in pure noise",
        "sampling starts from plain noise, and not from the slow patterns that the model would then know: leave it out",
    ),
    ProcessRule(
        ("diffusion.weighting", "model.prediction"),
        lambda c, p: c.diffusion.weighting == "sigma_sqrt" and (p.prediction == "flow" or p.edm_ve_sigmas is not None),
        '`diffusion.weighting = "sigma_sqrt"` cannot go with this model\'s noise levels',
        "its cleanest levels would weigh a million times as much as noise, and a handful of samples would decide every step: "
        'set `diffusion.weighting = "cosmap"`',
    ),
    ProcessRule(
        ("timesteps.resolution_noise", "model.noise_levels"),
        lambda c, p: c.timesteps.resolution_noise == "reindex" and p.edm_ve_sigmas is not None,
        '`timesteps.resolution_noise = "reindex"` cannot go with EDM noise levels',
        'there the UNet is told the noise itself, and no timestep: set it to "tilt"',
    ),
    ProcessRule(
        ("samples.grid", "samples.sigma_max", "model.zero_terminal_snr"),
        lambda c, p: c.samples.grid in ("karras", "exponential") and p.zero_terminal_snr and c.samples.sigma_max == "exact",
        '`samples.grid = "{c.samples.grid}"` cannot begin at the infinite noise of zero terminal SNR',
        'leave it out (trailing suits such models), or set `samples.sigma_max = "comfyui"` to see what that program would draw',
    ),
    ProcessRule(
        ("samples.grid", "model.prediction"),
        lambda c, p: c.samples.grid in ("karras", "exponential", "leading") and p.prediction == "flow",
        '`samples.grid = "{c.samples.grid}"` cannot go with a flow',
        "a flow starts at pure noise: leave it out, and set `samples.shift` to spend more steps there",
    ),
    ProcessRule(
        ("samples.grid", "model.zero_terminal_snr"),
        lambda c, p: c.samples.grid == "leading" and p.zero_terminal_snr,
        '`samples.grid = "leading"` never starts from the pure noise of zero terminal SNR',
        "pictures would come out grey: leave it out",
    ),
    ProcessRule(
        ("samples.sigma_max", "model.zero_terminal_snr"),
        lambda c, p: c.samples.sigma_max != "exact" and not p.zero_terminal_snr,
        "`samples.sigma_max` does nothing without zero terminal SNR",
        "this model's noise ends at a finite level of its own: leave it out",
    ),
    ProcessRule(
        ("samples.shift", "model.prediction"),
        lambda c, p: c.samples.shift != 1 and p.prediction != "flow",
        "`samples.shift` does nothing without a flow",
        'set `model.prediction = "flow"`, or leave it out',
    ),
)
"""Contradictions that depend on what the base model is. `{name}` is its file, `c` the config, `p` the process."""
