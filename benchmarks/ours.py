"""Our step and our loop, put together as a run puts them together, but from plain values: no config, no files, no loader.

Importing this needs no more than torch and diffusers; `our_loop` needs what the trainer needs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aquatint.data.batch import Batch
from aquatint.demo.model import random_tensors, tiny_spec
from aquatint.diffusion.parameterization import Prediction
from aquatint.models.sdxl.model import build_unet
from aquatint.models.sdxl.process import Process
from aquatint.optim.clipping import Clipping
from aquatint.training.objective import Objective
from aquatint.training.step import Parts, train_step

Loop = Callable[[Iterator[Batch], int], list[Any]]
"""Trains so many steps, one batch each, and returns the loss of each step, as a number or as a tensor that nobody has read."""

PX_PER_LATENT, PROMPT_TOKENS, POSITIONS = 8, 77, 64


class Silent:
    """Keeps what a display would show."""

    def __init__(self) -> None:
        self.losses: list[Any] = []

    def update(self, step: int, *, loss: Any, **shown: Any) -> None:
        self.losses.append(loss)

    def note(self, text: str) -> None:
        raise RuntimeError(text)


def tiny_unet(seed: int = 0) -> Any:
    """The demo's UNet, 8.0 million float32 weights: SDXL's topology at a thousandth of its size."""
    spec = tiny_spec()
    unet = build_unet(spec)
    unet.load_state_dict({name: tensor.load() for name, tensor in random_tensors("unet", spec, seed).items()}, assign=True)
    return unet.requires_grad_(True).train()


def our_unet(seed: int = 0) -> Any:
    """The same, made ready as a run does it; that tells the process how to go about memory too."""
    from aquatint.training.parallelize import ready_for_training

    return ready_for_training(tiny_unet(seed), gradient_checkpointing=False, device=torch.device("cpu"))


def draw_batches(unet_config: dict[str, Any], count: int, size: int, side_latent: int, seed: int = 0) -> list[Batch]:
    """Batches of noise in the place of pictures and captions; pinned where there is a GPU to copy them to."""
    bits = torch.Generator().manual_seed(seed)
    width, pooled = unet_config["cross_attention_dim"], unet_config["projection_class_embeddings_input_dim"]
    pooled -= 6 * unet_config["addition_time_embed_dim"]
    side_px = float(side_latent * PX_PER_LATENT)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=bits)

    batches = [
        Batch(
            latents=normal(size, 4, side_latent, side_latent),
            noise=normal(size, 4, side_latent, side_latent),
            timesteps=torch.randint(0, 1000, (size,), generator=bits),
            prompt_embeds=normal(size, PROMPT_TOKENS, width),
            pooled_prompt_embeds=normal(size, pooled),
            time_ids=torch.tensor([[side_px, side_px, 0.0, 0.0, side_px, side_px]] * size),
            loss_weights=torch.ones(size),
            names=("noise",) * size,
            positions=tuple(range(number * size, (number + 1) * size)),
            sources=(0,) * size,
        )
        for number in range(count)
    ]
    return [batch.pin_memory() for batch in batches] if torch.cuda.is_available() else batches


def our_parts(
    unet: Any,
    optimizer: Any,
    *,
    prediction: Prediction = "epsilon",
    learning_rate: float = 1e-5,
    autocast: bool = False,
    clip_norm: float = 1.0,
    device: torch.device | str = "cpu",
) -> Parts:
    """No average, no adaptation, no loss weights: what the script of the peers does."""
    process = Process(prediction)
    objective = Objective(process.schedule(), prediction, torch.ones(1000))
    device = torch.device(device)
    return Parts(
        unet=unet,
        optimizer=optimizer,
        ema=None,
        objective=objective,
        learning_rate=lambda step: learning_rate,
        autocast=autocast,
        clipping=Clipping("global", clip_norm, device=device),
        device=device,
    )


def our_loop(parts: Parts) -> Loop:
    """The trainer's own loop, with a display that only remembers and no task between steps."""
    from aquatint.training.state import TrainState
    from aquatint.training.trainer import Run, StopRequest, train

    def loop(batches: Iterator[Batch], steps: int) -> list[Any]:
        def stream(state: TrainState) -> Generator[Batch]:
            for batch in batches:  # noqa: UP028, since `yield from` would close them with this
                yield batch

        display = Silent()
        run = Run(
            folder=Path(), parts=parts, state=TrainState(), stream=stream, accumulation_steps=1, total_steps=steps, max_bad_steps=1,
            tasks=(), display=display,
        )  # fmt: skip
        train(run, StopRequest())
        return display.losses

    return loop


def our_steps(parts: Parts) -> Loop:
    """Step after step as the trainer launches them: the numbers of each are read when the next one is on its way."""

    def loop(batches: Iterator[Batch], steps: int) -> list[Any]:
        losses, launched = [], None
        for number in range(steps):
            following = train_step(parts, [next(batches)], number)
            if launched is not None:
                losses.append(launched.read().loss)
            launched = following
        return losses if launched is None else [*losses, launched.read().loss]

    return loop


def repeated(batches: Sequence[Batch]) -> Iterator[Batch]:
    """The batches, over and over."""
    while True:
        yield from batches
