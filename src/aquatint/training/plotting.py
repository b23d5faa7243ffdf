"""What a config will do, drawn before it does: the tables that the run itself uses, as pictures. A part of the composition root.

Needs the header of the base model alone. Pictures are counted, but not opened, where a length is given in epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from aquatint.config.schema import Config
from aquatint.data.bucket_sets import aspects_of
from aquatint.data.loader import Draws as SampleDraws
from aquatint.diffusion.grids import sampling_timesteps
from aquatint.errors import DataError
from aquatint.models.sdxl.generate import PX_PER_LATENT
from aquatint.models.sdxl.load import BaseModel, open_base
from aquatint.optim.lr import learning_rate_factor
from aquatint.optim.power_average import gamma_of_std, power_decay
from aquatint.planning.report import plan_of_steps
from aquatint.planning.shapes import sample_size, sets_of
from aquatint.planning.sources import is_remote, list_source, sources_of
from aquatint.storage import write_bytes
from aquatint.tracking.plots import (
    Array,
    Draws,
    Grid,
    Levels,
    Memory,
    Noise,
    Weights,
    plot_learning_rate,
    plot_noise,
    plot_sampling,
    plot_schedule,
    plot_timesteps,
    plot_weights,
)
from aquatint.training.ema import decay_at, decay_of_half_life
from aquatint.training.objectives import (
    choose_densities,
    choose_objective,
    choose_process,
    noise_kind,
    sampling_schedule,
    sampling_steps,
)
from aquatint.training.plot_words import (
    density_words,
    draw_words,
    grid_words,
    loss_words,
    memory_words,
    noise_words,
    rate_words,
    sampling_words,
    schedule_words,
    weight_words,
)

NUM_DRAWS = 8192  # of the histogram
NUM_NOISES, NOISE_SIDE = 32, 128  # samples, and the side of the latents of a square SDXL picture
TINY = 1e-300  # an average that keeps nothing keeps this

Shape = tuple[int, int]


class Drawn(NamedTuple):
    """A picture, and one line about what to see in it. Without a path it was left out, and the line says why."""

    path: Path | None
    words: str


def plot_run(config: Config, folder: Path) -> list[Drawn]:
    """Draws everything into a folder. Raises UsageError for a config that contradicts its base, ModelFileError for no base."""
    base = open_base(config.model.base, config.model.vae)
    return list(_plots(config, base, folder))


def _plots(config: Config, base: BaseModel, folder: Path) -> Iterator[Drawn]:
    process = choose_process(config, base)
    levels, weights, draws, grid = levels_of(config, base), weights_of(config, base), draws_of(config, base), grid_of(config, base)
    title = f"Noise levels: {process.words()}"
    yield _write(folder / "schedule.png", plot_schedule(title, levels), schedule_words(levels[0]))
    title = f"Loss: {loss_words(config, base)}{f', for {draws[0].name}' if len(draws) > 1 else ''}"
    yield _write(folder / "weights.png", plot_weights(title, [weights]), weight_words(config, weights))
    title = f"Timesteps: {density_words(config.timesteps, config.training.per_step)}"
    yield _write(folder / "timesteps.png", plot_timesteps(title, draws), draw_words(draws[0]))
    if config.noise.offset or config.noise.pyramid:
        words = "left: grain, right: slow patterns; above the grey line they are stronger than in the noise that sampling starts from"
        yield _write(folder / "noise.png", plot_noise(f"Noise: {noise_words(config.noise)}", [noise_of(config)]), words)
    title = f"Sampling: {sampling_words(config, base)}"
    yield _write(folder / "sampling.png", plot_sampling(title, [grid]), grid_words(grid))
    yield _plot_learning_rate(config, folder / "learning_rate.png")


def _write(path: Path, png: bytes, words: str) -> Drawn:
    write_bytes(path, png)
    return Drawn(path, words)


def _plot_learning_rate(config: Config, path: Path) -> Drawn:
    try:
        samples_per_epoch = count_samples(config)
    except DataError as error:
        return Drawn(None, f"{path.name} is left out: the config counts in epochs, and {error.message}")
    rates, memories, base_share = learning_rates(config, samples_per_epoch), *memories_of(config, samples_per_epoch)
    png = plot_learning_rate(f"Learning rate and average: {rate_words(config)}", rates, memories)
    return _write(path, png, memory_words(rates, memories, base_share))


def shapes_on_offer(config: Config) -> tuple[Shape, ...]:
    """Height and width of the largest, the squarest and the smallest shape of the config's buckets, in pixels, each once."""
    shapes = np.concatenate([bucket_set.shapes for bucket_set in sets_of(config)])
    areas, stretch = shapes.prod(axis=1), np.abs(np.log(aspects_of(shapes))).round(9)
    chosen = (np.lexsort((stretch, -areas))[0], np.lexsort((-areas, stretch))[0], np.lexsort((stretch, areas))[0])
    return tuple(dict.fromkeys((int(shapes[i][0]), int(shapes[i][1])) for i in chosen))


def levels_of(config: Config, base: BaseModel) -> list[Levels]:
    """The noise levels of the run; those of each shape where they differ."""
    objective, shapes = choose_objective(config, base), shapes_on_offer(config)
    schedules = [objective.schedule_at(height // PX_PER_LATENT, width // PX_PER_LATENT) for height, width in shapes]
    if not objective.reindexes:
        shapes, schedules = (), schedules[:1]
    names = [_size(shape) for shape in shapes] or [choose_process(config, base).words()]
    return [Levels(name, table.alphas.numpy(), table.sigmas.numpy()) for name, table in zip(names, schedules, strict=True)]


def weights_of(config: Config, base: BaseModel) -> Weights:
    """The loss weights of the run's first step, and the draws of its largest shape."""
    objective = choose_objective(config, base)
    density = choose_densities(config, base, np.array(shapes_on_offer(config)[:1]))[0]
    weights = objective.weights.double()
    return Weights("weight", weights.numpy(), (weights * objective.errors_of_x0.double()).numpy(), density)


def draws_of(config: Config, base: BaseModel) -> list[Draws]:
    """How often timesteps are drawn, and the first draws of the run; for each shape where they differ, with draws for the first."""
    shapes = shapes_on_offer(config)
    densities = choose_densities(config, base, np.array(shapes))
    drawn = first_draws(config, densities[0])
    if all(np.array_equal(density, densities[0]) for density in densities):
        return [Draws("pictures of all shapes", densities[0], drawn)]
    tables = zip(shapes, densities, (drawn, *[None] * len(shapes)), strict=False)
    return [Draws(f"pictures of {_size(shape)}", density, draws) for shape, density, draws in tables]


def first_draws(config: Config, density: Array) -> npt.NDArray[np.int64]:
    """The timesteps of the first samples of the run, (steps, samples of a step), if all are of a shape with this density."""
    per_step = config.training.per_step
    steps = max(1, NUM_DRAWS // per_step)
    draws = SampleDraws(config.run.seed, per_step, spread=config.timesteps.spread, densities=(density,))
    return np.asarray(draws.timesteps(range(steps * per_step), 0).numpy().reshape(steps, per_step))


def grid_of(config: Config, base: BaseModel) -> Grid:
    """Where the steps of sample pictures lie."""
    process, objective = choose_process(config, base), choose_objective(config, base)
    schedule, steps = sampling_schedule(config, process, sample_size(config), objective), sampling_steps(config, process)
    timesteps = sampling_timesteps(steps.grid, schedule, steps.num_steps)
    alphas, sigmas = schedule.levels(torch.tensor(timesteps, dtype=torch.float64))
    return Grid(steps.grid, np.array(timesteps), (sigmas / alphas).numpy())


def noise_of(config: Config) -> Noise:
    """How much the mean of the run's noise varies over squares, for latents without a picture of their own."""
    draws = SampleDraws(config.run.seed, 1, noise=noise_kind(config))
    noise = draws.noises(range(NUM_NOISES), torch.zeros(NUM_NOISES, 4, NOISE_SIDE, NOISE_SIDE))[0]
    sides = 2 ** np.arange(NOISE_SIDE.bit_length())
    squares = [torch.nn.functional.avg_pool2d(noise, int(side)) for side in sides]
    return Noise("this run's noise", sides.astype(np.float64), np.array([square.square().mean().sqrt().item() for square in squares]))


def count_samples(config: Config) -> int:
    """Samples per epoch, if some length is given in epochs; 1 if none is. Raises DataError where there are no pictures."""
    lengths = (config.training.length, config.lr.warmup, config.ema.half_life if config.ema.enabled else None)
    if not any(length is not None and length.unit == "epochs" for length in lengths):
        return 1
    plan = plan_of_steps(config, [0 if is_remote(source) else list_source(source).num_pictures for source in sources_of(config)])
    if plan is None:
        raise DataError("there is no picture yet", hint="add pictures to data.sources, or give lengths in steps")
    return plan.samples_per_epoch


def learning_rates(config: Config, samples_per_epoch: int) -> Array:
    """The learning rate of each step of the run."""
    lengths = {"samples_per_step": config.training.per_step, "samples_per_epoch": samples_per_epoch}
    total, warmup = config.training.length.in_steps(**lengths), config.lr.warmup.in_steps(**lengths)
    factors = [
        learning_rate_factor(step, schedule=config.lr.schedule, warmup_steps=warmup, total_steps=total, end_factor=config.lr.end_factor)
        for step in range(total)
    ]
    return config.optimizer.learning_rate * np.array(factors)


def memories_of(config: Config, samples_per_epoch: int) -> tuple[list[Memory], float]:
    """The memory of each average that the run keeps, and the share of the base model in the first of them at its end."""
    section, per_step = config.ema, config.training.per_step
    lengths = {"samples_per_step": per_step, "samples_per_epoch": samples_per_epoch}
    steps = range(config.training.length.in_steps(**lengths))
    if not section.enabled:
        return [], 0.0
    decay = section.decay if section.half_life is None else decay_of_half_life(section.half_life.in_samples(**lengths), per_step)
    decays = np.array([decay_at(step, decay=decay, warmup=section.warmup) for step in steps])
    memories = [Memory(f"decay {decay:.6g}{', warmed up' if section.warmup else ''}", half_ages(decays))]
    for std in section.power_stds:
        gamma = gamma_of_std(std)
        kept = np.array([power_decay((step + 1) * per_step, per_step, gamma) for step in steps])
        memories.append(Memory(f"power average of width {std:g}", half_ages(kept)))
    return memories, float(np.exp(np.log(decays.clip(min=TINY)).sum()))


def half_ages(decays: Array) -> Array:
    """After each step, (n,): so many steps make up the newer half of an average that kept these shares (n,) of itself.

    One more than there were steps where the weights it began with are still more than half of it.
    """
    kept = np.concatenate([[0.0], -np.cumsum(np.log(decays.clip(min=TINY)))])
    newest = np.arange(1, len(kept))
    oldest = np.searchsorted(kept, kept[1:] - np.log(2), side="right") - 1
    return np.asarray(newest - oldest, dtype=np.float64)


def _size(shape: Shape) -> str:
    return f"{shape[1]} × {shape[0]}"
