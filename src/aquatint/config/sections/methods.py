"""The model, and what it learns at which noise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from aquatint.config.sections.fields import Every, Section, Share


class ModelSection(Section):
    base: Path
    """The model to start from: one `.safetensors` file as ComfyUI, A1111 and Forge use it, or a diffusers folder."""
    vae: Path | None = None
    """Another autoencoder than the one in `base`: a `.safetensors` file or a diffusers folder."""
    prediction: Literal["auto", "epsilon", "v_prediction", "x0", "edm", "flow"] = "auto"
    """What the UNet predicts. `auto` keeps what the base model was trained for; see docs/diffusion.md for the others."""
    zero_terminal_snr: Literal["auto"] | bool = "auto"
    """Whether the last timestep is pure noise (arXiv 2305.08891). Needs v_prediction or x0. `auto` keeps the base's own."""
    noise_levels: Literal["auto", "sdxl", "edm"] = "auto"
    """`sdxl`: its 1000 timesteps. `edm`: even in the logarithm of the noise, which the UNet is told (CosXL, Playground)."""
    edm_sigmas: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0, le=1e5)]] | None = None
    """Least and most noise of `noise_levels = "edm"`; the base's own if not set, or else 0.002 and 80."""
    retarget: bool = False
    """Go on although the base says that it was made for another prediction: it has to learn anew, for thousands of steps."""
    standardise_latents: bool = False
    """Train on latents with mean 0 and deviation 1 per channel; exports carry that in their own autoencoder. For long runs only."""


class DiffusionSection(Section):
    weighting: Literal[
        "auto", "none", "min_snr", "soft_min_snr", "clamped_v", "truncated", "debiased", "p2", "cosmap", "sigma_sqrt", "like_epsilon",
        "like_v", "learned", "adaptive",
    ] = "auto"  # fmt: skip
    """Loss weight by noise level. `auto` is clamped_v with zero terminal SNR, and none without."""
    gamma: Annotated[float, Field(gt=0.0)] = 5.0
    """Where min_snr (arXiv 2303.09556), soft_min_snr and clamped_v stop to grow with the SNR."""
    weight_floor: Share = 0.05
    """Least weight of any timestep, where a weighting gives 0 to pure noise, which then would never be trained."""
    p2_k: Annotated[float, Field(gt=0.0)] = 1.0
    """k of p2: SNR / (k + SNR)^gamma on the error of the picture (arXiv 2204.00227)."""
    p2_gamma: Annotated[float, Field(ge=0.0, le=4.0)] = 1.0
    """gamma of p2."""
    normalise_weights: bool = False
    """Scale the weights to a mean of 1 over the timesteps that are drawn, so that learning rates compare between weightings."""
    uncertainty_learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-2
    """Learning rate of the 128 numbers that `weighting = "learned"` learns (arXiv 2312.02696)."""
    adaptive_ranges: Annotated[int, Field(ge=1, le=1000)] = 20
    """Ranges of timesteps that `weighting = "adaptive"` keeps a mean loss of. Must divide 1000."""
    adaptive_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    """Share of a range's mean loss that is kept at each sample in it."""
    loss: Literal["mse", "huber", "smooth_l1"] = "mse"
    """What is made of the difference. `huber` and `smooth_l1` forgive outliers (arXiv 2403.16728)."""
    huber_c: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Where huber and smooth_l1 bend, at the last timestep."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How that changes from 1 at the first timestep to `huber_c` at the last; `constant` is `huber_c` at all."""
    huber_scale: Annotated[float, Field(gt=0.0)] = 1.0
    """Multiplies it at every timestep."""
    mask_prior_weight: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """Outside of the masks, stay with what the base model predicts, this strongly. Keeps the base in memory a second time."""


class NoiseSection(Section):
    offset: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Offset noise: so strong a shift of whole channels. 0.0357 is common, 0.05 is SDXL's own last stage."""
    offset_slope: Annotated[float, Field(ge=-10.0, le=10.0)] = 0.0
    """Added to `offset` for each unit that a channel's mean differs from 0."""
    pyramid: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Pyramid noise: so much of each next, coarser level. 0.3 is common."""
    pyramid_levels: Annotated[int, Field(ge=1, le=10)] = 6
    """Most levels of pyramid noise."""
    input_perturbation: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Noise the input so much more than the target says (arXiv 2301.11706). 0.1 is the paper's."""
    immiscible: bool = False
    """In each batch, give each picture the noise that suits it best (arXiv 2406.12303). Does little below 8 pictures a batch."""


class TimestepsSection(Section):
    density: Literal["uniform", "logit_normal", "mode", "cosmap", "log_normal", "cosine"] = "uniform"
    """How often each noise level is trained: over the timestep, or, for log_normal and cosine, over the noise itself."""
    mean: Annotated[float, Field(ge=-10.0, le=10.0)] = 0.0
    """Centre of logit_normal (of the timestep's logit) or log_normal (of the noise's logarithm; EDM: -1.2, EDM2: -0.4)."""
    std: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    """Width of logit_normal or log_normal."""
    mode_scale: Annotated[float, Field(ge=-1.0, le=1.75)] = 1.29
    """Of `mode` (arXiv 2403.03206)."""
    shift: Annotated[float, Field(ge=0.01, le=100.0)] = 1.0
    """Draw noise so many times as strong (arXiv 2403.03206, equation 23). For the densities over the timestep."""
    resolution_noise: Literal["none", "tilt", "reindex"] = "none"
    """Larger pictures need more noise. `tilt` trains it more often; `reindex` redefines timesteps, which no other program knows."""
    lowest: Annotated[int, Field(ge=0, le=999)] = 0
    """First timestep that is trained."""
    highest: Annotated[int, Field(ge=0, le=999)] = 999
    """Last timestep that is trained."""
    uniform_share: Share = 0.0
    """Share of the draws that are uniform all the same, so that no level starves."""
    terminal_prob: Literal["auto"] | Share = "auto"
    """Share of the draws at `highest`, beside the density's own. `auto`: 0.01 with zero terminal SNR, 0 without."""
    spread: Literal["strata", "lattice", "independent"] = "strata"
    """How the samples of an optimizer step share out the levels: one in each part, equally far apart, or by chance."""
    importance: bool = False
    """Draw levels with a large loss more often and weigh them less (arXiv 2102.09672): less noise in the gradient, the same mean."""
    importance_ranges: Annotated[int, Field(ge=1, le=1000)] = 50
    """Ranges of timesteps that share a record of their losses. Must divide 1000."""


class AdapterSection(Section):
    kind: Literal["none", "lora", "dora"] = "none"
    """Train small matrices beside the frozen UNet: LoRA (arXiv 2106.09685), or DoRA (arXiv 2402.09353). `none` trains the UNet itself."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """How many directions each layer can learn. Files and memory grow with it."""
    alpha: Annotated[float, Field(gt=0.0, le=4096.0)] | None = None
    """What is learned counts alpha / rank times. As large as the rank if not set, which makes that 1."""
    rslora: bool = False
    """alpha / sqrt(rank) instead (arXiv 2312.03732), so that a learning rate suits every rank. Files tell programs an alpha that fits."""
    targets: Literal["attention", "transformer", "all"] = "transformer"
    """`attention` alone; `transformer`: every linear layer of the transformers, as sd-scripts does; `all`: convolutions too (LoCon)."""
    start_from: Path | None = None
    """Go on from this LoRA, in kohya's or diffusers' names, instead of from nothing. Its rank, layers and kind must be those set here."""


class TextEncodersSection(Section):
    train: tuple[Literal["text_encoder", "text_encoder_2"], ...] = ()
    """Those that are trained beside the UNet: CLIP-L (`text_encoder`), OpenCLIP bigG (`text_encoder_2`). No caption is cached then."""
    learning_rate_factor: Annotated[float, Field(gt=0.0, le=1000.0)] = 0.1
    """Times `optimizer.learning_rate`, where no group fits. A tenth, since what an encoder forgets of other words shows in no loss."""
    stop_after: Every = None
    """Train them only so long, such as "2 epochs"; from there on they stay as they are, and the UNet goes on."""
