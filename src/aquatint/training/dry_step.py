"""A forward and backward pass before the first step, on the largest batch there is: what does not fit fails now, not in hour three.

No weight moves, no gradient stays, and no random number of the run is used. What a step needs beside the pass is held in reserve
meanwhile: the optimizer's state, which is only made in the first step, and the temporary tensors of its largest update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from string import ascii_lowercase

import torch

from aquatint.config.schema import Config
from aquatint.data.batch import Batch
from aquatint.errors import UsageError, full_memory
from aquatint.models.sdxl.generate import PX_PER_LATENT
from aquatint.models.sdxl.model import ModelSpec
from aquatint.models.sdxl.tokenizer import num_chunks
from aquatint.optim.adamw_bf16 import has_kernels
from aquatint.planning.fit import advice
from aquatint.planning.kept import optimizer_room_bytes
from aquatint.planning.memory import gib, state_parts, update_bytes
from aquatint.training.layout import Layout
from aquatint.training.step import Parts, losses_of
from aquatint.utils.progress import say
from aquatint.utils.seeds import generator

LATENT_CHANNELS = 4
CHUNK_TOKENS = 77
MAX_COUNTED_TEXTS = 100  # the longest ones: among them is the one with the most chunks


@dataclass(frozen=True)
class Size:
    """What a batch of the run is like at most. `widths` are those of prompt embeddings and of pooled ones."""

    batch_size: int
    height: int
    width: int
    tokens: int
    widths: tuple[int, int]


@dataclass(frozen=True)
class Reserve:
    """What is in memory during a step beside the pass, in bytes: the optimizer's whole state, and per element of a weight in its update."""

    state: int
    update: int


def longest_tokens(texts: Sequence[str]) -> int:
    """How many tokens the longest of the texts takes, in whole chunks; those of the empty text if there is none."""
    return CHUNK_TOKENS * max(num_chunks(sorted(texts, key=len)[-MAX_COUNTED_TEXTS:]), default=1)


def random_batch(size: Size, device: torch.device) -> Batch:
    """A batch of that size, of noise."""
    draw = generator(0, "dry-step", 0)
    count, shape = size.batch_size, (LATENT_CHANNELS, size.height // PX_PER_LATENT, size.width // PX_PER_LATENT)

    def normal(*dims: int) -> torch.Tensor:
        return torch.from_numpy(draw.standard_normal((count, *dims), dtype="float32"))

    batch = Batch(
        latents=normal(*shape),
        noise=normal(*shape),
        timesteps=torch.full((count,), 500),
        prompt_embeds=normal(size.tokens, size.widths[0]),
        pooled_prompt_embeds=normal(size.widths[1]),
        time_ids=torch.tensor([[size.height, size.width, 0, 0, size.height, size.width]] * count, dtype=torch.float32),
        loss_weights=torch.ones(count),
        names=("dry step",) * count,
        positions=tuple(range(count)),
        sources=(0,) * count,
    )
    return batch.to(device)


def full_captions(size: Size) -> tuple[str, ...]:
    """Captions that fill so many tokens, all different."""
    words = (CHUNK_TOKENS - 2) * (size.tokens // CHUNK_TOKENS)
    return tuple(" ".join(ascii_lowercase[index % len(ascii_lowercase)] * words) for index in range(size.batch_size))


def dry_step(parts: Parts, size: Size, accumulation_steps: int, reserve: Reserve, advice: Callable[[], str]) -> None:
    """Goes through a step that changes nothing. Raises UsageError, with the `advice` as its hint, if the memory does not suffice."""
    if reason := out_of_memory(parts, size, accumulation_steps, reserve):
        what = f"a batch of {size.batch_size} with {size.width} × {size.height} pixels and {size.tokens} tokens"
        raise UsageError(f"{what} does not fit into the memory ({reason})", hint=advice())


def out_of_memory(parts: Parts, size: Size, accumulation_steps: int, reserve: Reserve) -> str | None:
    """Goes through a step that changes nothing, and says why the memory does not suffice if it does not."""
    failure: BaseException | None = None
    try:
        with state_held(parts, reserve):
            if accumulation_steps > 1:
                one_pass(parts, size)
            with updates_held(parts, reserve):
                one_pass(parts, size)
    except (RuntimeError, MemoryError) as error:
        if full_memory(error) is None:
            raise
        failure = error.with_traceback(None)  # which would hold on to what did fit
    finally:
        forget(parts)
    return None if failure is None else first_line(failure)


def one_pass(parts: Parts, size: Size) -> None:
    """Forward and backward, as a step does it."""
    batch = random_batch(size, parts.device)
    losses_of(parts, batch if parts.texts is None else replace(batch, captions=full_captions(size)))[2].mean().backward()


@contextlib.contextmanager
def state_held(parts: Parts, reserve: Reserve) -> Iterator[None]:
    """Keeps memory for what of the optimizer's state is not there yet."""
    tensors = [value for state in parts.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    there = sum(value.nbytes for value in tensors if value.device.type == parts.device.type)
    kept = room(parts.device, max(0, reserve.state - there))
    try:
        yield
    finally:
        del kept


@contextlib.contextmanager
def updates_held(parts: Parts, reserve: Reserve) -> Iterator[None]:
    """Takes the memory of each weight's update for a moment: inside the backward pass if the run steps there, or after it."""
    lacking: list[BaseException] = []

    def stepped(param: torch.Tensor) -> None:
        try:
            room(parts.device, reserve.update * param.numel())
        except (RuntimeError, MemoryError) as error:  # raised in a hook, it would keep the pass in memory until the next one
            lacking.append(error.with_traceback(None))
        param.grad = None

    params = [param for group in parts.optimizer.param_groups for param in group["params"]]
    handles = [param.register_post_accumulate_grad_hook(stepped) for param in (params if parts.fused is not None else ())]
    try:
        yield
        if lacking:
            raise lacking[0]
        room(parts.device, reserve.update * max(param.numel() for param in params) if parts.fused is None else 0)
    finally:
        for handle in handles:
            handle.remove()


def room(device: torch.device, num_bytes: int) -> torch.Tensor:
    """Memory that nothing is written to."""
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def forget(parts: Parts) -> None:
    """Takes back what the passes left: gradients, and memory in blocks of sizes that the run may not ask for."""
    parts.optimizer.zero_grad(set_to_none=True)
    if parts.adaptation is not None:
        parts.adaptation.forget()
    if parts.device.type == "cuda":
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


# from a config


def try_step(config: Config, spec: ModelSpec, layout: Layout, parts: Parts) -> None:
    """The dry step of a run, if it is to have one. Raises UsageError."""
    if not wants_dry_step(config, parts.device):
        return
    size, section = largest_size(config, spec, layout), config.training

    def tip() -> str:
        return advice(config, spec, torch.cuda.get_device_properties(parts.device).total_memory if parts.device.type == "cuda" else None)

    if parts.device.type == "cuda":  # what was reserved to encode pictures, or for a batch that did not fit, is not this step's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(parts.device)
    dry_step(parts, size, section.accumulation_steps, reserve_of(config, spec, parts.device), tip)
    words = f"{section.at_once} × {size.width} × {size.height} pixels, {size.tokens} tokens"
    most = f", with {gib(torch.cuda.max_memory_reserved(parts.device))} at most" if parts.device.type == "cuda" else ""
    say(f"dry step    {words}: it fits{most}")


def lack_of_memory(config: Config, spec: ModelSpec, layout: Layout, parts: Parts) -> str | None:
    """Why the run's largest batch does not fit; None if it does, or if the run is not to try it."""
    if not wants_dry_step(config, parts.device):
        return None
    size = largest_size(config, spec, layout)
    return out_of_memory(parts, size, config.training.accumulation_steps, reserve_of(config, spec, parts.device))


@contextlib.contextmanager
def as_in_training(config: Config, spec: ModelSpec, parts: Parts) -> Iterator[None]:
    """For the block, as much memory is taken as between two later steps, so that pictures fit later too if they fit now."""
    with state_held(parts, reserve_of(config, spec, parts.device)) if wants_dry_step(config, parts.device) else contextlib.nullcontext():
        yield


def wants_dry_step(config: Config, device: torch.device) -> bool:
    """`auto` is for GPUs: without memory on a CPU, the system ends the process, and says nothing."""
    return device.type == "cuda" if config.training.dry_step == "auto" else config.training.dry_step


def reserve_of(config: Config, spec: ModelSpec, device: torch.device) -> Reserve:
    """A kernel updates in place, without temporary tensors."""
    optimizer = config.optimizer
    in_place = optimizer.name in ("adamw_bf16", "adamw8bit", "adafactor") and optimizer.kernel != "none" and has_kernels(device)
    in_main_memory = config.memory.optimizer_state == "cpu" and device.type != "cpu"
    state = optimizer_room_bytes(config, spec) if in_main_memory else state_parts(config, spec)[1].bytes
    return Reserve(state, 0 if in_place else update_bytes(config))


def largest_size(config: Config, spec: ModelSpec, layout: Layout) -> Size:
    """The largest batch that the run can draw: its largest bucket, with its longest caption."""
    height, width = max(layout.plan.shapes.tolist(), key=lambda shape: shape[0] * shape[1])
    train = layout.train
    tokens = longest_tokens(train.texts if train.samples.captions is None else list(train.samples.captions))
    widths = spec.unet["cross_attention_dim"], spec.text_encoder_2["projection_dim"]
    return Size(config.training.at_once, height, width, tokens, widths)
