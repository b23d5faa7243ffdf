"""Batches, read from the cache ahead of the training step.

A batch is a function of its index: what is drawn for a sample depends on the seed and the sample's position in the run
alone. So neither the number of workers nor a restart changes a batch.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from aquatint.data.batch import Batch, Item, View, pad_prompts
from aquatint.data.captions import draw_dropout
from aquatint.data.sampler import Order
from aquatint.data.shards import ShardStore
from aquatint.diffusion.noise import draw_noise
from aquatint.diffusion.timesteps import draw_timesteps
from aquatint.errors import AquatintError
from aquatint.utils.seeds import generator


class Choice(NamedTuple):
    """What is read for a sample; `text_key` None stands for zeros."""

    name: str
    view: View
    text_key: str | None


class BatchReader:
    """Makes batches of the run out of cached entries. Picklable: workers have one each.

    `buckets` holds the pictures of each bucket, repeats included, as `order` counts them. With `flip_prob` above 0 each view of an
    item is followed by its mirror image. `samples_per_step` is the number of samples of an optimizer step, which share
    out the timesteps.
    """

    def __init__(
        self,
        latents: ShardStore,
        texts: ShardStore,
        buckets: tuple[tuple[Item, ...], ...],
        order: Order,
        *,
        seed: int,
        samples_per_step: int,
        scaling_factor: float,
        empty_text_key: str,
        flip_prob: float = 0.0,
        dropout_prob: float = 0.0,
        dropout_zeros_share: float = 0.0,
    ) -> None:
        if tuple(len(bucket) for bucket in buckets) != order.counts:
            raise ValueError(f"the buckets hold {[len(bucket) for bucket in buckets]} samples, the order is for {order.counts}")
        self.latents, self.texts, self.buckets, self.order = latents, texts, buckets, order
        self.seed, self.samples_per_step, self.scaling_factor = seed, samples_per_step, scaling_factor
        self.empty_text_key, self.flip_prob = empty_text_key, flip_prob
        self.dropout_prob, self.dropout_zeros_share = dropout_prob, dropout_zeros_share

    def read(self, batch_index: int) -> Batch:
        """Batch `batch_index` of the run. Raises StorageError, and CorruptEntry for an entry that is damaged."""
        bucket, members = self.order.batch(batch_index)
        first = batch_index * self.order.batch_size
        positions = range(first, first + self.order.batch_size)
        choices = [self._choose(self.buckets[bucket][member], position) for member, position in zip(members, positions, strict=True)]
        mean, std = self._read_latents(choices)
        _, channels, height, width = mean.shape
        eps = draw_noise(self.seed, "latent", positions, (channels, height, width))
        noise = draw_noise(self.seed, "noise", positions, (channels, height, width))
        timesteps = draw_timesteps(self.seed, positions, self.samples_per_step)
        return self._batch(choices, positions, mean + std * eps, noise, timesteps)

    def read_items(self, items: Sequence[Item]) -> Batch:
        """Items of one shape as they are, for validation: first view, first caption, mean latents; no noise, timesteps 0."""
        choices = [Choice(item.name, item.views[0], item.text_keys[0]) for item in items]
        mean, _ = self._read_latents(choices)
        return self._batch(choices, range(len(items)), mean, torch.zeros_like(mean), torch.zeros(len(items), dtype=torch.int64))

    def _choose(self, item: Item, position: int) -> Choice:
        """The random choices of one sample, each from a stream of its own."""
        kind = draw_dropout(self.seed, position, prob=self.dropout_prob, zeros_share=self.dropout_zeros_share)
        text_keys: dict[str, str | None] = {"zeros": None, "empty": self.empty_text_key}
        text_keys["keep"] = item.text_keys[self._draw_index("text-variant", position, len(item.text_keys))]
        return Choice(item.name, self._choose_view(item, position), text_keys[kind])

    def _choose_view(self, item: Item, position: int) -> View:
        if self.flip_prob == 0:
            return item.views[self._draw_index("view", position, len(item.views))]
        variant = self._draw_index("view", position, len(item.views) // 2)
        flipped = generator(self.seed, "flip", position).random() < self.flip_prob
        return item.views[2 * variant + flipped]

    def _draw_index(self, stream: str, position: int, count: int) -> int:
        return int(count * generator(self.seed, stream, position).random())

    def _read_latents(self, choices: Sequence[Choice]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (B, 4, h, w), float32, unscaled."""
        entries = [self.latents.read(choice.view.latent_key) for choice in choices]
        return torch.stack([entry["mean"] for entry in entries]).float(), torch.stack([entry["std"] for entry in entries]).float()

    def _read_texts(self, choices: Sequence[Choice]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings (B, 77 n, D) and pooled embeddings (B, P), float32; both are zero where there is no text."""
        entries = [self._read_text(choice.text_key or self.empty_text_key) for choice in choices]
        prompt_embeds = pad_prompts([entry["prompt_embeds"] for entry in entries], self._empty_text["prompt_embeds"]).float()
        pooled = torch.stack([entry["pooled"] for entry in entries]).float()
        zeros = torch.tensor([choice.text_key is None for choice in choices])
        prompt_embeds[zeros] = 0.0
        pooled[zeros] = 0.0
        return prompt_embeds, pooled

    def _read_text(self, key: str) -> dict[str, torch.Tensor]:
        return self._empty_text if key == self.empty_text_key else self.texts.read(key)

    @cached_property
    def _empty_text(self) -> dict[str, torch.Tensor]:
        return self.texts.read(self.empty_text_key)

    def _batch(
        self, choices: Sequence[Choice], positions: Sequence[int], latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> Batch:
        prompt_embeds, pooled = self._read_texts(choices)
        return Batch(
            latents=latents * self.scaling_factor,
            noise=noise,
            timesteps=timesteps,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled,
            time_ids=torch.tensor([choice.view.time_ids for choice in choices], dtype=torch.float32),
            names=tuple(choice.name for choice in choices),
            positions=tuple(positions),
        )


def stream(
    reader: BatchReader, start: int, end: int, *, workers: int, prefetch: int, pin: bool, start_method: str | None = None
) -> Generator[Batch]:
    """Batches `start … end - 1`, each of the `workers` processes holding up to `prefetch` of them ready; 0 reads in this one.

    `start_method` is `fork`, `spawn` or `forkserver`; None takes Python's own choice. Closing the generator ends the workers.
    Raises AquatintError: the one that a worker met, or one that says what became of the worker.
    """
    if start >= end:
        return
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
        with _named_errors("starting the processes that read batches"):
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
                f"a process that reads batches has died ({_how_it_ended(process.exitcode)})",
                hint="the machine or container may be short of memory or shared memory: lower loader.workers or loader.prefetch, "
                "then run the same command again",
            )


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"signal {-exit_code}, {signal.strsignal(-exit_code)}"
    return f"exit code {exit_code}"


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C reaches the whole process group: the parent decides what it means, and still needs batches for its step."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
