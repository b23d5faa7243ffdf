"""What a training step is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch


@dataclass
class Batch:
    """Samples of equal shape. `latents` are scaled; `positions` are the samples' numbers in the run, counted from 0.

    The embeddings are missing where texts are encoded as they are needed; `captions` then has the texts, None standing for zeros.
    `masks` says where the loss counts, and is missing where it counts everywhere.
    """

    latents: torch.Tensor  # (B, 4, h, w) float32
    noise: torch.Tensor  # (B, 4, h, w) float32
    timesteps: torch.Tensor  # (B,) int64
    prompt_embeds: torch.Tensor | None  # (B, 77 n, D) float32
    pooled_prompt_embeds: torch.Tensor | None  # (B, P) float32
    time_ids: torch.Tensor  # (B, 6) float32
    loss_weights: torch.Tensor  # (B,) float32
    names: tuple[str, ...]
    positions: tuple[int, ...]
    sources: tuple[int, ...]
    masks: torch.Tensor | None = None  # (B, 1, h, w) float32 in 0..1
    captions: tuple[str | None, ...] | None = None
    perturbation: torch.Tensor | None = None  # (B, 4, h, w) float32: other noise, for input perturbation

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


def join_texts(
    texts: list[tuple[torch.Tensor, torch.Tensor]], empty: tuple[torch.Tensor, torch.Tensor], zeros: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt embeddings (B, 77 n, D) and pooled embeddings (B, P), float32, of a batch; both are zero where `zeros` says so.

    `texts` holds the embeddings (77 n, D) and (P,) of each sample, `empty` those of the empty text.
    """
    prompt_embeds = pad_prompts([embeds for embeds, _ in texts], empty[0]).float()
    pooled = torch.stack([pooled for _, pooled in texts]).float()
    nothing = torch.tensor(zeros, device=pooled.device)
    prompt_embeds[nothing] = 0.0
    pooled[nothing] = 0.0
    return prompt_embeds, pooled
