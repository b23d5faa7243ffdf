"""A step of `train-vae` before its first, as all later ones are: with the discriminator, which may join in long after."""

from __future__ import annotations

import torch

from aquatint.errors import UsageError, full_memory
from aquatint.models.sdxl.generate import PX_PER_LATENT
from aquatint.training.dry_step import LATENT_CHANNELS, first_line, room
from aquatint.training.vae_pictures import PictureBatch
from aquatint.training.vae_step import VaeParts, passes
from aquatint.utils.progress import say
from aquatint.utils.seeds import generator

MOMENTS_BYTES = 8  # of AdamW, per weight


def try_vae_step(parts: VaeParts, batch_size: int, side_px: int) -> None:
    """Goes through a step that changes nothing. Raises UsageError if the memory does not suffice."""
    what = f"{batch_size} × {side_px} × {side_px} pixels"
    if reason := out_of_memory(parts, batch_size, side_px):
        hint = "lower `vae_training.batch_size` or `vae_training.resolution`, or set `training.gradient_checkpointing = true`"
        raise UsageError(f"a step of {what} does not fit into the memory ({reason})", hint=hint)
    say(f"dry step    {what}{', judged' if parts.adversary else ''}: it fits")


def out_of_memory(parts: VaeParts, batch_size: int, side_px: int) -> str | None:
    """Why such a step does not fit, while memory is held back for the moments; None if it does."""
    failure: BaseException | None = None
    try:
        held = room(parts.device, MOMENTS_BYTES * sum(weight.numel() for weight in _trained(parts)))
        passes(parts, random_pictures(batch_size, side_px).to(parts.device), parts.adversary)
        del held
    except (RuntimeError, MemoryError) as error:
        if full_memory(error) is None:
            raise
        failure = error.with_traceback(None)  # which would hold on to what did fit
    finally:
        for weight in _trained(parts):
            weight.grad = None
        if parts.device.type == "cuda":
            torch.cuda.empty_cache()
    return None if failure is None else first_line(failure)


def _trained(parts: VaeParts) -> list[torch.nn.Parameter]:
    others = parts.adversary.discriminator.parameters() if parts.adversary is not None else ()
    return [*parts.decoder.parameters(), *others]


def random_pictures(batch_size: int, side_px: int) -> PictureBatch:
    """A batch of crops, of noise."""
    draw, side = generator(0, "vae-dry-step", 0), side_px // PX_PER_LATENT
    images = torch.from_numpy(draw.random((batch_size, 3, side_px, side_px), dtype="float32")) * 2 - 1
    noise = torch.from_numpy(draw.standard_normal((batch_size, LATENT_CHANNELS, side, side), dtype="float32"))
    return PictureBatch(images, noise, ("dry step",) * batch_size)
