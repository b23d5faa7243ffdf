"""The four networks of SDXL, their configs, and how each is called.

Importing this module does not import torch: the configs serve planning too. Modules are built on the meta device, which
costs nothing; `load` gives them their weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from math import prod
from typing import TYPE_CHECKING, Any

from aquatint.models.sdxl.process import SDXL_SCALING, LatentScaling
from aquatint.models.sdxl.shapes import CARRIED, COMPONENTS, Component, Shape, TextEncoder, component_shapes, heard_shapes

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

LOGVAR_RANGE = (-30.0, 20.0)  # outside it the autoencoder's own code does not trust the log-variance either


@dataclass(frozen=True)
class ModelSpec:
    """The configs of the four networks, as diffusers and transformers write them."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    text_encoder_2: dict[str, Any]

    def shapes(self, component: Component) -> dict[str, Shape]:
        """Internal tensor name -> shape of one network, without building it."""
        return component_shapes(component, getattr(self, component))

    def heard_shapes(self, component: TextEncoder) -> dict[str, Shape]:
        """The same for the part of a text encoder that the UNet is told anything by."""
        return heard_shapes(component, getattr(self, component))

    def num_parameters(self, component: Component) -> int:
        """How many numbers a network holds, without the tensor that no module uses."""
        return sum(prod(shape) for name, shape in self.shapes(component).items() if name != CARRIED.get(component))

    def same_sizes(self, other: ModelSpec) -> bool:
        """Whether the files of both hold the same tensors."""
        return all(self.shapes(component) == other.shapes(component) for component in COMPONENTS)


def sdxl_spec() -> ModelSpec:
    """SDXL 1.0 base, and every model made from it."""
    assets = files("aquatint.models.sdxl") / "assets"
    return ModelSpec(**{component: json.loads((assets / f"{component}.json").read_text()) for component in COMPONENTS})


def build_unet(spec: ModelSpec) -> UNet2DConditionModel:
    """The UNet on the meta device: shapes without memory."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**spec.unet)


def build_vae(spec: ModelSpec) -> AutoencoderKL:
    """The autoencoder on the meta device."""
    import torch
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(**spec.vae)


def build_text_encoders(spec: ModelSpec) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """CLIP-L and OpenCLIP bigG on the meta device."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        return (
            CLIPTextModel(CLIPTextConfig(**spec.text_encoder)),
            CLIPTextModelWithProjection(CLIPTextConfig(**spec.text_encoder_2)),
        )


def count_positions(clip: CLIPTextModel, bigg: CLIPTextModelWithProjection) -> None:
    """Gives both encoders the numbers of their positions, which are in no file and not on the meta device."""
    import torch

    for embeddings in (clip.embeddings, bigg.text_model.embeddings):
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings).unsqueeze(0)


def predict(
    unet: torch.nn.Module,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    time_ids: torch.Tensor,
) -> torch.Tensor:
    """The UNet's output for a batch, as float32 (B, 4, h, w).

    Latents and embeddings are cast to the UNet's dtype; `timesteps` (B,) and `time_ids` (B, 6) never are, because
    bfloat16 cannot hold whole numbers above 256.
    """
    dtype = next(unet.parameters()).dtype
    conditions = {"text_embeds": pooled_prompt_embeds.to(dtype), "time_ids": time_ids.float()}
    output = unet(
        noisy_latents.to(dtype), timesteps, encoder_hidden_states=prompt_embeds.to(dtype), added_cond_kwargs=conditions, return_dict=False
    )
    prediction: torch.Tensor = output[0].float()
    return prediction


class VaeEncoder:
    """Pictures to latent distributions, on the autoencoder's device and in its dtype.

    `load_precise` loads the same autoencoder in float32, for what is not finite in half precision.
    """

    def __init__(self, vae: AutoencoderKL, *, digest: str, load_precise: Callable[[], AutoencoderKL] | None = None) -> None:
        self.vae = vae
        self.digest = digest
        self._load_precise = load_precise

    @cached_property
    def precise(self) -> VaeEncoder | None:
        """The encoder in float32, loaded when it is first needed; None if this is it."""
        return None if self._load_precise is None else VaeEncoder(self._load_precise(), digest=self.digest)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float32 in [-1, 1] -> (B, 8, H/8, W/8) float32 on the CPU: mean and standard deviation.

        Both are raw: see `process.LatentScaling`. Values that are not finite are passed on.
        """
        import torch

        with torch.no_grad():
            moments = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist.parameters
            mean, log_variance = moments.float().chunk(2, dim=1)
            return torch.cat([mean, torch.exp(0.5 * log_variance.clamp(*LOGVAR_RANGE))], dim=1).cpu()


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor, scaling: LatentScaling = SDXL_SCALING) -> torch.Tensor:
    """Scaled latents (B, 4, h, w) -> pictures (B, 3, 8h, 8w), float32 in [-1, 1], on the autoencoder's device.

    One picture is decoded at a time: a decoder's activations are the largest of the whole model.
    """
    import torch

    raw = scaling.undo(latents).to(vae.device, vae.dtype)
    with torch.no_grad():
        return torch.cat([vae.decode(one).sample.float().clamp(-1, 1) for one in raw.split(1)])
