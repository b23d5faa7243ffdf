"""What a training step is given, and what it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class View:
    """A cached cut of a picture, with what SDXL is told about it: original h, w; crop top, left; target h, w."""

    latent_key: str
    time_ids: tuple[int, int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class Item:
    """A picture of the training set: the cuts and the caption renderings that a sample can be made of."""

    name: str
    views: tuple[View, ...]
    text_keys: tuple[str, ...]


@dataclass
class Batch:
    """Samples of equal shape. `latents` are scaled; `positions` are the samples' numbers in the run, counted from 0."""

    latents: torch.Tensor  # (B, 4, h, w) float32
    noise: torch.Tensor  # (B, 4, h, w) float32
    timesteps: torch.Tensor  # (B,) int64
    prompt_embeds: torch.Tensor  # (B, 77 n, D) float32
    pooled_prompt_embeds: torch.Tensor  # (B, P) float32
    time_ids: torch.Tensor  # (B, 6) float32
    names: tuple[str, ...]
    positions: tuple[int, ...]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device; the copy of pinned memory goes on while the CPU does something else."""
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in memory that a GPU can copy from by itself."""
        return self._each_tensor(lambda tensor: tensor.pin_memory())

    def _each_tensor(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **changed)


def pad_prompts(prompts: list[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
    """Prompt embeddings (77 n, D) of several lengths as one tensor (B, 77 max n, D).

    Short ones are followed by encoded empty chunks `empty` (77, D), as A1111 and Forge do it.
    """
    length = max(prompt.shape[0] for prompt in prompts)
    return torch.stack([torch.cat([prompt, empty.repeat((length - prompt.shape[0]) // empty.shape[0], 1)]) for prompt in prompts])
