"""What kind of diffusion a UNet is made for: the part of a model that its weights do not show.

A wrong guess here is the commonest way to ruin a training run or a picture, so it is one value, read from a file's markers and
metadata, written back on export, and compared with what the config asks for. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from aquatint.diffusion.parameterization import Prediction
    from aquatint.diffusion.schedule import Schedule

VAE_SCALING_FACTOR = 0.13025  # SDXL's, not SD 1's 0.18215
EDM_SIGMA_DATA = 0.5  # what every program assumes of an EDM checkpoint (arXiv 2206.00364)
EDM_VE_SIGMAS = (0.002, 80.0)


@dataclass(frozen=True)
class LatentScaling:
    """Raw latents of the autoencoder to those of the UNet: (raw - mean) factor, by channel."""

    mean: tuple[float, ...]
    factor: tuple[float, ...]

    def __call__(self, raw: Tensor) -> Tensor:
        """Raw latents (B, 4, h, w) as the UNet is trained on them, float32."""
        mean, factor = (raw.new_tensor(values).float().view(-1, 1, 1) for values in (self.mean, self.factor))
        return (raw.float() - mean) * factor

    def undo(self, latents: Tensor) -> Tensor:
        """The UNet's latents as the autoencoder decodes them, float32."""
        mean, factor = (latents.new_tensor(values).float().view(-1, 1, 1) for values in (self.mean, self.factor))
        return latents.float() / factor + mean


SDXL_SCALING = LatentScaling((0.0,) * 4, (VAE_SCALING_FACTOR,) * 4)
RAW_MEAN, RAW_STD = (-1.6574, 1.886, -1.383, 2.5155), (8.4927, 5.9022, 6.5498, 5.2299)
"""Of the raw latents of SDXL's autoencoder, by channel (Playground v2.5's statistics)."""
STANDARDISED = LatentScaling(RAW_MEAN, tuple(1 / std for std in RAW_STD))
PLAYGROUND_SCALING = LatentScaling(RAW_MEAN, tuple(0.5 / std for std in RAW_STD))


@dataclass(frozen=True)
class Process:
    """What the UNet predicts, at which noise levels, of which latents."""

    prediction: Prediction = "epsilon"
    zero_terminal_snr: bool = False
    """Whether the last of SDXL's timesteps is pure noise. A flow always ends there."""
    edm_ve_sigmas: tuple[float, float] | None = None
    """Least and most noise of an EDM model, which is told the noise and not a timestep; None for SDXL's timesteps, or a flow."""
    latents: LatentScaling = SDXL_SCALING
    folded: bool = False
    """Whether the file's own autoencoder gives standardised latents under SDXL's factor."""
    declared: bool = False
    """Whether the file says all that, or it is what is assumed of a file that says nothing."""

    @property
    def sigma_data(self) -> float:
        """Spread of the data that an EDM output is written for; 1, and without meaning, for the others."""
        return EDM_SIGMA_DATA if self.prediction == "edm" else 1.0

    def schedule(self, *, shift: float = 1.0) -> Schedule:
        """The noise levels; those of a flow moved by `shift`."""
        from aquatint.diffusion.schedule import edm_schedule, flow_schedule, sdxl_schedule

        if self.prediction == "flow":
            return flow_schedule(shift)
        if self.edm_ve_sigmas is not None:
            return edm_schedule(*self.edm_ve_sigmas)
        return sdxl_schedule(zero_terminal_snr=self.zero_terminal_snr)

    def words(self) -> str:
        """The process in a few words."""
        if self.prediction == "flow":
            return "rectified flow"
        levels = "" if self.edm_ve_sigmas is None else f" at EDM noise levels {self.edm_ve_sigmas[0]:g} to {self.edm_ve_sigmas[1]:g}"
        terminal = ", zero terminal SNR" if self.zero_terminal_snr else ""
        latents = ", standardised latents" if self.folded or self.latents != SDXL_SCALING else ""
        return f"{self.prediction}{levels}{terminal}{latents}"
