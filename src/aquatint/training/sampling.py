"""Pictures from prompts, with the weights as they are: for a look during training, and for `aquatint sample`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aquatint.data.contact_sheet import contact_sheet
from aquatint.data.image import save_png
from aquatint.diffusion.schedule import Schedule
from aquatint.models.sdxl.generate import Steps, generate
from aquatint.models.sdxl.load import BaseModel
from aquatint.training.objective import Objective

TextEmbeds = tuple[torch.Tensor, torch.Tensor]  # prompt_embeds (77 n, D), pooled (P,)
Encode = Callable[[Sequence[str]], Sequence[TextEmbeds]]


@dataclass(frozen=True)
class SampleRequest:
    """What to make. `negative_prompt` is None for the zero unconditional. `base` lends the autoencoder while pictures are made.

    `encode` gives the embeddings of texts, as they are when pictures are made. `schedule` is the one that is sampled: it may be the
    trained one with other ends.
    """

    base: BaseModel
    device: torch.device
    prompts: tuple[str, ...]
    negative_prompt: str | None
    encode: Encode
    height: int
    width: int
    schedule: Schedule
    steps: Steps
    seed: int
    autocast: bool = False
    averaged: bool = True
    """Whether a training run draws with its moving average."""
    batch_size: int = 8


def looked_up(embeds: Mapping[str, TextEmbeds]) -> Encode:
    """What encodes texts that were encoded before."""
    return lambda texts: [embeds[text] for text in texts]


def make_samples(unet: Any, objective: Objective, request: SampleRequest) -> np.ndarray:
    """One picture per prompt, uint8 (B, H, W, 3). The noise depends on the seed and the prompt's place in the list."""
    vae = request.base.load_vae(torch.float32).to(request.device)
    positives = request.encode(request.prompts)
    unwanted = None if request.negative_prompt is None else request.encode([request.negative_prompt])[0]
    pictures = []
    for indices in same_length(positives, request.batch_size):
        negative = unwanted and stack([unwanted] * len(indices), request.device)
        pictures.append(
            generate(
                unet, vae, request.schedule, objective.prediction,
                stack([positives[i] for i in indices], request.device), negative,
                steps=request.steps, seed=request.seed, positions=indices, height=request.height, width=request.width,
                sigma_data=objective.sigma_data, scaling=objective.scaling, autocast=request.autocast,
            )
        )  # fmt: skip
    order = [i for indices in same_length(positives, request.batch_size) for i in indices]
    return np.concatenate(pictures)[np.argsort(order)]


def same_length(embeds: Sequence[TextEmbeds], batch_size: int) -> list[list[int]]:
    """Indices of prompts in batches whose embeddings have the same number of tokens."""
    by_length: dict[int, list[int]] = {}
    for index, (hidden, _) in enumerate(embeds):
        by_length.setdefault(len(hidden), []).append(index)
    return [group[i : i + batch_size] for group in by_length.values() for i in range(0, len(group), batch_size)]


def stack(embeds: Sequence[TextEmbeds], device: torch.device) -> TextEmbeds:
    """Embeddings of several prompts as one batch, float32."""
    hidden, pooled = zip(*embeds, strict=True)
    return torch.stack(hidden).float().to(device), torch.stack(pooled).float().to(device)


def write_samples(path: Path, unet: Any, objective: Objective, request: SampleRequest) -> np.ndarray:
    """Makes the pictures and writes them as one labelled sheet. Returns them."""
    was_training = unet.training
    unet.eval()
    try:
        pictures = make_samples(unet, objective, request)
    finally:
        unet.train(was_training)
    save_png(path, contact_sheet(list(pictures), list(request.prompts), columns=min(4, len(pictures))))
    return pictures
