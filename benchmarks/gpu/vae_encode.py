"""How many pictures a second does SDXL's autoencoder encode on one GPU: ours, and diffusers' as it is called by scripts?

    PYTHONPATH=src python3 -m benchmarks.gpu.vae_encode --row 11 --contender ours [--dry]

Row 11 of the plan: 1024 px, eight pictures at a time, from pinned memory to latents on the CPU. The script encodes in float32; ours is what
fills the cache, in bf16. What stands behind a comma is an experiment of this benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from aquatint.models.sdxl.model import VaeEncoder, build_vae
from benchmarks.gpu.rig import Build, Contender, Row, Scene, filled, main_of

ROWS = {
    11: Row(
        11, "latents, 1024 px", 1024, (8, 4, 1),
        ("diffusers in float32", "diffusers in bfloat16", "ours", "ours, channels_last", "ours, channels_last and compiled"),
    )
}  # fmt: skip
Encode = Callable[[Tensor], Tensor]


def looped(encode: Encode) -> Any:
    """Pictures in, latents on the CPU; in the place of a loss, the mean of the latents."""

    def loop(batches: Iterator[Tensor], steps: int) -> list[Tensor]:
        return [encode(next(batches)).float().mean() for _ in range(steps)]

    return loop


def made_vae(scene: Scene, dtype: torch.dtype) -> Any:
    return filled(build_vae(scene.spec), scene, dtype).requires_grad_(False).eval()


def plain(dtype: torch.dtype) -> Build:
    def build(row: Row, scene: Scene, batch_size: int) -> Contender:
        vae = made_vae(scene, dtype)

        @torch.no_grad()
        def encode(images: Tensor) -> Tensor:
            latents: Tensor = vae.encode(images.to(scene.device, dtype)).latent_dist.sample()
            return (latents * vae.config.scaling_factor).cpu()

        return Contender(looped(encode))

    return build


def ours(*, channels_last: bool = False, compiles: bool = False) -> Build:
    def build(row: Row, scene: Scene, batch_size: int) -> Contender:
        vae = made_vae(scene, torch.bfloat16)
        if channels_last:
            vae.to(memory_format=torch.channels_last)
        if compiles:
            vae.encoder.compile(backend="eager" if scene.is_dry else "inductor")
        return Contender(looped(VaeEncoder(vae, digest="random").encode))

    return build


BUILDS: dict[str, Build] = {
    "diffusers in float32": plain(torch.float32),
    "diffusers in bfloat16": plain(torch.bfloat16),
    "ours": ours(),
    "ours, channels_last": ours(channels_last=True),
    "ours, channels_last and compiled": ours(channels_last=True, compiles=True),
}


def pictures(row: Row, scene: Scene, batch_size: int) -> Iterator[Tensor]:
    bits = torch.Generator().manual_seed(0)
    made = [torch.rand(batch_size, 3, row.side_px, row.side_px, generator=bits) * 2 - 1 for _ in range(2)]
    if scene.device.type == "cuda":
        made = [images.pin_memory() for images in made]
    while True:
        yield from made


def flops(row: Row, scene: Scene) -> int:
    vae = build_vae(scene.spec)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(torch.empty(1, 3, row.side_px, row.side_px, device="meta"))
    return int(counter.get_total_flops())


if __name__ == "__main__":
    main_of(__doc__, ROWS, BUILDS, flops, pictures)
