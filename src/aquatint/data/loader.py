"""Batches, read from the cache ahead of the training step.

A batch is a function of its index: what is drawn for a sample depends on the seed and the sample's position in the run
alone. So neither the number of workers or ranks nor a restart changes a sample.
"""

from __future__ import annotations

import contextlib
import signal
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from aquatint.data.batch import Batch, join_texts
from aquatint.data.captions import CaptionPolicy, draw_dropout, render
from aquatint.data.engines import how_it_ended
from aquatint.data.sampler import Order
from aquatint.data.samples import Samples
from aquatint.data.shards import ShardStore
from aquatint.diffusion.noise import adaptive_strength, draw_noise, draw_offset, immiscible, offset, pyramid
from aquatint.diffusion.timesteps import Probabilities, Spread, draw_timesteps
from aquatint.errors import AquatintError
from aquatint.utils.seeds import generator


class Choice(NamedTuple):
    """What is read for a sample: a view of a row, and one of the row's texts, or "zeros", or the "empty" text."""

    row: int
    view: int
    text: int
    dropout: str  # "keep", "zeros" or "empty"


@dataclass(frozen=True)
class NoiseKind:
    """What is done to plain noise: see `diffusion.noise`. `perturbed`: other noise comes along, for the input alone."""

    offset: float = 0.0
    offset_slope: float = 0.0
    pyramid: float = 0.0
    pyramid_levels: int = 0
    perturbed: bool = False
    immiscible: bool = False


@dataclass(frozen=True)
class Draws:
    """What is random about a sample. `samples_per_step` is the number of samples of an optimizer step, which share out the timesteps.

    `densities` says how often each timestep is drawn, by bucket; without it all are alike.
    """

    seed: int
    samples_per_step: int
    flip_prob: float = 0.0
    dropout_prob: float = 0.0
    dropout_zeros_share: float = 0.0
    noise: NoiseKind = NoiseKind()
    spread: Spread = "strata"
    densities: tuple[Probabilities, ...] | None = None

    def timesteps(self, positions: Sequence[int], bucket: int) -> torch.Tensor:
        """The timesteps (B,) of samples of one bucket."""
        probabilities = None if self.densities is None else self.densities[bucket]
        return draw_timesteps(self.seed, positions, self.samples_per_step, probabilities, spread=self.spread)

    def noises(self, positions: Sequence[int], latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The noise of samples with these scaled latents (B, 4, h, w), and that of the input alone, if there is any."""
        _, channels, height, width = latents.shape
        shape = (channels, height, width)
        kind, noise = self.noise, draw_noise(self.seed, "noise", positions, shape)
        if kind.immiscible:
            noise = immiscible(latents, noise)
        if kind.pyramid:
            noise = pyramid(noise, self.seed, positions, kind.pyramid, levels=kind.pyramid_levels)
        if kind.offset or kind.offset_slope:
            strength = adaptive_strength(latents, kind.offset, kind.offset_slope)
            noise = offset(noise, draw_offset(self.seed, positions, channels), strength)
        return noise, draw_noise(self.seed, "perturbation", positions, shape) if kind.perturbed else None


@dataclass(frozen=True)
class Entries:
    """Reads cached entries into batches. Picklable: workers have a copy each.

    `scaling` makes raw latents those of the UNet; `empty_text_key` is the key of the encoded empty text.
    """

    latents: ShardStore
    texts: ShardStore
    masks: ShardStore | None
    scaling: Callable[[torch.Tensor], torch.Tensor]
    empty_text_key: bytes
    mask_floor: float = 0.0

    def fixed(self, samples: Samples, rows: Sequence[int], texts: Sequence[str] | None = None) -> Batch:
        """Pictures of one shape as they are, for validation: first view, first text, mean latents; no noise, timesteps 0.

        With `texts`, those of `samples`, the batch has captions instead of embeddings.
        """
        choices = [Choice(row, 0, samples.text_of[row][0], "keep") for row in rows]
        mean, _ = self.read_latents(samples, choices)
        batch = self.batch(
            samples, choices, range(len(rows)), self.scaling(mean), torch.zeros_like(mean), torch.zeros(len(rows), dtype=torch.int64)
        )
        if texts is not None:
            return replace(batch, captions=tuple(texts[choice.text] for choice in choices))
        return self.with_texts(batch, samples, choices)

    def read_latents(self, samples: Samples, choices: Sequence[Choice]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (B, 4, h, w), float32, unscaled."""
        entries = self.latents.read_batch([samples.latent_key(choice.row, choice.view) for choice in choices])
        mean, std = entries["moments"].float().chunk(2, dim=1)
        return mean, std

    def batch(
        self,
        samples: Samples,
        choices: Sequence[Choice],
        positions: Sequence[int],
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> Batch:
        """The batch without its texts. Latents are scaled (B, 4, h, w)."""
        rows = [choice.row for choice in choices]
        return Batch(
            latents=latents,
            noise=noise,
            timesteps=timesteps,
            prompt_embeds=None,
            pooled_prompt_embeds=None,
            time_ids=torch.tensor([samples.time_ids[choice.row, choice.view].tolist() for choice in choices], dtype=torch.float32),
            loss_weights=torch.from_numpy(samples.loss_weights[rows]),
            names=tuple(samples.names[row] for row in rows),
            positions=tuple(positions),
            sources=tuple(int(samples.sources[row]) for row in rows),
            masks=self._read_masks(samples, choices, tuple(latents.shape[2:])) if samples.has_masks else None,
        )

    def with_texts(self, batch: Batch, samples: Samples, choices: Sequence[Choice]) -> Batch:
        """The batch with the cached embeddings of its texts."""
        texts = [self._empty if choice.dropout != "keep" else self._read_text(samples.text_key(choice.text)) for choice in choices]
        prompt_embeds, pooled = join_texts(texts, self._empty, [choice.dropout == "zeros" for choice in choices])
        return replace(batch, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled)

    def _read_text(self, key: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        entry = self.texts.read(key)
        return entry["prompt_embeds"], entry["pooled"]

    @cached_property
    def _empty(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._read_text(self.empty_text_key)

    def _read_masks(self, samples: Samples, choices: Sequence[Choice], size_hw: tuple[int, ...]) -> torch.Tensor:
        """(B, 1, h, w) float32, at least `mask_floor` everywhere; 1 where a picture has no mask."""
        assert self.masks is not None
        keys = [samples.mask_key(choice.row, choice.view) for choice in choices]
        masks = [torch.ones(1, *size_hw) if key is None else self.masks.read(key)["mask"].float() for key in keys]
        return torch.stack(masks).clamp_(min=self.mask_floor)


class BatchReader:
    """Makes batches of the run out of cached entries. Picklable: workers have one each.

    `order` counts the rows of each bucket of `samples`. `policy` renders captions where texts are encoded as they are
    needed, with the trigger words of their source. Of each batch, rank `rank` of `world` reads its share: together the
    ranks read what one alone would.
    """

    def __init__(
        self,
        entries: Entries,
        samples: Samples,
        order: Order,
        draws: Draws,
        *,
        policies: tuple[CaptionPolicy, ...] = (),
        drop_probs: dict[str, float] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if [len(rows) for rows in samples.buckets()] != [sum(group.count for group in bucket) for bucket in order.buckets]:
            raise ValueError("the order is for other buckets than the samples have")
        if order.batch_size % world:
            raise ValueError(f"a batch of {order.batch_size} cannot be shared by {world} processes alike")
        if draws.noise.immiscible and world > 1:
            raise ValueError("noise is assigned within a whole batch: a process that reads a share of it cannot do so")
        self.entries, self.samples, self.order, self.draws = entries, samples, order, draws
        self.policies, self.drop_probs = policies, drop_probs
        self.rank, self.world = rank, world

    def read(self, batch_index: int) -> Batch:
        """This rank's share of batch `batch_index`. Raises StorageError, and CorruptEntry for an entry that is damaged."""
        bucket, members = self.order.batch(batch_index)
        size = self.order.batch_size // self.world
        mine = range(self.rank * size, (self.rank + 1) * size)
        positions = [batch_index * self.order.batch_size + place for place in mine]
        first_row = self.samples.bucket(bucket).start
        choices = [self._choose(first_row + members[place], position) for place, position in zip(mine, positions, strict=True)]
        mean, std = self.entries.read_latents(self.samples, choices)
        _, channels, height, width = mean.shape
        shape = (channels, height, width)
        eps = draw_noise(self.draws.seed, "latent", positions, shape)
        latents = self.entries.scaling(mean + std * eps)
        noise, perturbation = self.draws.noises(positions, latents)
        batch = self.entries.batch(self.samples, choices, positions, latents, noise, self.draws.timesteps(positions, bucket))
        batch = replace(batch, perturbation=perturbation)
        if self.samples.captions is not None:
            return replace(batch, captions=tuple(map(self._render, choices, positions)))
        return self.entries.with_texts(batch, self.samples, choices)

    def _choose(self, row: int, position: int) -> Choice:
        """The random choices of one sample, each from a stream of its own."""
        draws = self.draws
        dropout = draw_dropout(draws.seed, position, prob=draws.dropout_prob, zeros_share=draws.dropout_zeros_share)
        text = self.samples.text_of[row][0]
        if self.samples.captions is None:
            text = self.samples.draw_text(row, generator(draws.seed, "text-variant", position).random())
        return Choice(row, self._choose_view(position), text, dropout)

    def _choose_view(self, position: int) -> int:
        views, seed = self.samples.num_views, self.draws.seed
        if self.draws.flip_prob == 0:
            return int(views * generator(seed, "view", position).random())
        variant = int(views // 2 * generator(seed, "view", position).random())
        flipped = generator(seed, "flip", position).random() < self.draws.flip_prob
        return 2 * variant + flipped

    def _render(self, choice: Choice, position: int) -> str | None:
        """The caption of a sample as it is encoded; None stands for zeros."""
        if choice.dropout != "keep":
            return {"zeros": None, "empty": ""}[choice.dropout]
        assert self.samples.captions is not None
        captions = [self.samples.captions[text] for text in self.samples.text_of[choice.row]]
        policy = self.policies[int(self.samples.sources[choice.row])]
        return render(captions, policy, generator(self.draws.seed, "caption", position), drop_probs=self.drop_probs)


def stream(
    reader: BatchReader, start: int, end: int, *, workers: int, prefetch: int, pin: bool, start_method: str | None = None
) -> Generator[Batch]:
    """Batches `start … end - 1`, each of the `workers` processes holding up to `prefetch` of them ready; 0 reads in this one.

    `start_method` is `fork`, `spawn` or `forkserver`; None takes Python's own choice. Closing the generator ends the workers.
    Raises AquatintError: the one that a worker met, or one that says what became of the worker.
    """
    if start >= end:
        return
    with _without_advice():
        loader = DataLoader(
            _Reads(reader),
            batch_size=None,
            sampler=range(start, end),
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            pin_memory=pin,
            multiprocessing_context=start_method if workers else None,
            worker_init_fn=_leave_signals_to_parent,
            generator=torch.Generator(),  # not the global one: reading ahead must not change what others draw
        )
    batches, processes = _start(loader)
    try:
        for index in range(start, end):
            yield _next(batches, processes, index)
    finally:
        if workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]  # now, and not when the last traceback is forgotten


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Without DataLoader's remark on more workers than cores: the user has asked for them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        yield


@dataclass(frozen=True)
class _Failure:
    """An AquatintError on its way out of a worker: the error itself cannot be pickled."""

    kind: type[AquatintError]
    message: str
    hint: str


class _Reads(Dataset[Batch | _Failure]):
    """A BatchReader as DataLoader wants it."""

    def __init__(self, reader: BatchReader) -> None:
        self.reader = reader

    def __getitem__(self, index: int) -> Batch | _Failure:
        try:
            return self.reader.read(index)
        except AquatintError as error:
            return _Failure(type(error), error.message, error.hint)


Loader = DataLoader[Batch | _Failure]


def _start(loader: Loader) -> tuple[Iterator[Batch | _Failure], list[BaseProcess]]:
    """Starts the workers, and keeps the process's answer to SIGCHLD.

    DataLoader sets one that raises wherever the main thread happens to be when a worker dies, which may be halfway
    through an optimizer step. We look at the workers between steps instead.
    """
    others, handler = active_children(), signal.getsignal(signal.SIGCHLD)
    try:
        with _named_errors("starting the processes that read batches"), _without_advice():
            batches = iter(loader)
    finally:
        if signal.getsignal(signal.SIGCHLD) is not handler:
            signal.signal(signal.SIGCHLD, handler)
    return batches, [process for process in active_children() if process not in others]


def _next(batches: Iterator[Batch | _Failure], processes: Sequence[BaseProcess], index: int) -> Batch:
    _check_alive(processes)
    with _named_errors(f"reading batch {index}", processes):
        batch = next(batches)
    if isinstance(batch, _Failure):
        raise batch.kind(batch.message, hint=batch.hint)
    return batch


@contextlib.contextmanager
def _named_errors(action: str, processes: Sequence[BaseProcess] = ()) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _check_alive(processes)
        reason = [type(error).__name__, *str(error).splitlines()][-1]  # a worker's traceback ends with what went wrong
        raise AquatintError(f"{action} failed: {reason}", hint="this is a mistake in aquatint: please report it, with the log") from error


def _check_alive(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if not process.is_alive():
            raise AquatintError(
                f"a process that reads batches has died ({how_it_ended(process.exitcode)})",
                hint="the machine or container may be short of memory or shared memory: lower loader.workers or loader.prefetch, "
                "then run the same command again",
            )


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C reaches the whole process group: the parent decides what it means, and still needs batches for its step."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
