"""How files say what kind of diffusion they are for, and how we say it.

Programs look for tensors without meaning as tensors ("markers"): `v_pred` and `ztsnr`; `edm_vpred.sigma_max` and `.sigma_min` of
v-prediction told the noise (CosXL); `edm_mean` and `edm_std` of Playground's EDM. There is no marker for a flow, for x0, or for an EDM
model of SDXL's own latents: those are set up by hand, which the usage hint explains, and are known again here by our own metadata.
Diffusers folders say it in the config of their scheduler. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aquatint.errors import ModelFileError
from aquatint.models.sdxl.process import (
    EDM_SIGMA_DATA,
    EDM_VE_SIGMAS,
    PLAYGROUND_SCALING,
    RAW_MEAN,
    RAW_STD,
    SDXL_SCALING,
    LatentScaling,
    Process,
)  # fmt: skip
from aquatint.tensor_file import TensorFile

if TYPE_CHECKING:
    from torch import Tensor

PROCESS_KEY = "aquatint.process"  # metadata: what markers cannot say
PLAYGROUND_FACTOR = 0.5
_SAME = 1e-3


def read_markers(file: TensorFile) -> Process:
    """The process of a single file: its markers, which every program reads, before our metadata, before ModelSpec's.

    Raises ModelFileError for numbers that no program would follow.
    """
    names, metadata = file.tensors, file.metadata
    if "edm_mean" in names and "edm_std" in names:
        mean, std = file.numbers("edm_mean"), file.numbers("edm_std")
        if not _close(mean, RAW_MEAN) or not _close(std, RAW_STD):
            raise ModelFileError(
                f"{file.path} has the markers of Playground's EDM models with other statistics ({mean}, {std})",
                hint="programs ignore those numbers and use Playground's: choose SDXL 1.0, Playground v2.5, or a model made from them",
            )
        return Process("edm", edm_ve_sigmas=EDM_VE_SIGMAS, latents=PLAYGROUND_SCALING, declared=True)
    if "edm_vpred.sigma_max" in names:
        lowest = file.numbers("edm_vpred.sigma_min") if "edm_vpred.sigma_min" in names else EDM_VE_SIGMAS[:1]
        (highest,) = file.numbers("edm_vpred.sigma_max") or (0.0,)
        if len(lowest) != 1 or not 0 < lowest[0] < highest < float("inf"):
            raise ModelFileError(f"{file.path} claims noise levels {lowest} to {highest}", hint="the file is damaged: choose another copy")
        return Process("v_prediction", edm_ve_sigmas=(lowest[0], highest), declared=True)
    noted = _read_note(file) if PROCESS_KEY in metadata else Process()
    if "v_pred" in names:
        return replace(noted, prediction="v_prediction", zero_terminal_snr="ztsnr" in names, edm_ve_sigmas=None, declared=True)
    if noted.declared:
        return noted
    is_v = metadata.get("modelspec.prediction_type", "").lower() in ("v", "v_prediction")
    return replace(noted, prediction="v_prediction", zero_terminal_snr="ztsnr" in names, declared=True) if is_v else noted


def _read_note(file: TensorFile) -> Process:
    from aquatint.diffusion.parameterization import PREDICTIONS

    try:
        values = json.loads(file.metadata[PROCESS_KEY])
        sigmas = values.get("edm_ve_sigmas")
        process = Process(
            values["prediction"], bool(values["zero_terminal_snr"]), sigmas and tuple(map(float, sigmas)), folded=bool(values["folded"]),
            declared=values["prediction"] != "epsilon",
        )  # fmt: skip
        if process.prediction not in PREDICTIONS or len(process.edm_ve_sigmas or (0, 0)) != 2:
            raise ValueError(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(
            f"{file.path} says in `{PROCESS_KEY}` what cannot be understood: {error}",
            hint="the file may be of a newer version of aquatint: update, or set `model.prediction` for a copy without that metadata",
        ) from error
    return process


def markers(process: Process) -> dict[str, Tensor]:
    """The marker tensors of a single file. Those without a number are empty: only their names count."""
    import torch

    if process.prediction == "edm" and process.latents == PLAYGROUND_SCALING:
        return {"edm_mean": torch.tensor(RAW_MEAN), "edm_std": torch.tensor(RAW_STD)}
    if process.prediction != "v_prediction":
        return {}
    if process.edm_ve_sigmas is not None:
        lowest, highest = process.edm_ve_sigmas
        return {"edm_vpred.sigma_min": torch.tensor(lowest), "edm_vpred.sigma_max": torch.tensor(highest)}
    return {name: torch.zeros(0) for name in (["v_pred", "ztsnr"] if process.zero_terminal_snr else ["v_pred"])}


def process_note(process: Process) -> dict[str, str]:
    """Our own metadata about a process, where markers do not say all of it."""
    told_by_markers = process.prediction == "epsilon" or bool(markers(process))
    if told_by_markers and not process.folded and (process.edm_ve_sigmas is None or process.prediction != "epsilon"):
        return {}
    values = {name: value for name, value in asdict(process).items() if name not in ("latents", "declared")}
    return {PROCESS_KEY: json.dumps(values)}


def usage_hint(process: Process) -> str | None:
    """What somebody has to set up to see right pictures; None where nothing is."""
    hints = {
        "v_prediction": "v-prediction: programs that know the markers in this file set themselves up",
        "x0": "the UNet predicts the picture: set the node ModelSamplingDiscrete to x0; A1111 and Forge cannot sample it",
        "edm": "EDM model: set the node ModelSamplingContinuousEDM to edm, sigma 0.002 to 80",
        "flow": "rectified flow: add the node ModelSamplingSD3 (shift 1 to 6), sampler euler; A1111 and Forge cannot sample it",
    }
    hint = hints.get(process.prediction)
    if process.prediction == "v_prediction" and process.zero_terminal_snr:
        hint = "v-prediction with zero terminal SNR: programs that know the markers in this file set themselves up"
    if process.folded:
        note = "use the VAE inside this file; another VAE, TAESD previews and latent upscalers give wrong colours"
        hint = f"{hint}; {note}" if hint else note
    return hint


def scheduler_config(process: Process) -> dict[str, Any]:
    """The scheduler that samples the model rightly in diffusers' SDXL pipeline.

    v and x0 start at the last timestep (arXiv 2305.08891, section 3.3); epsilon models keep SDXL's own setting.
    """
    if process.prediction == "flow":  # one of the schedulers of flows that this pipeline can drive
        return {
            "_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": 1000, "prediction_type": "flow_prediction",
            "use_flow_sigmas": True, "flow_shift": 1.0, "solver_order": 2, "timestep_spacing": "linspace", "final_sigmas_type": "zero",
        }  # fmt: skip
    if process.edm_ve_sigmas is not None:
        lowest, highest = process.edm_ve_sigmas
        return {
            "_class_name": "EDMEulerScheduler", "num_train_timesteps": 1000, "sigma_min": lowest, "sigma_max": highest,
            "sigma_data": process.sigma_data, "sigma_schedule": "karras", "rho": 7.0,
            "prediction_type": "epsilon" if process.prediction == "edm" else process.prediction,  # its name for F
        }  # fmt: skip
    from aquatint.diffusion.schedule import BETA_END, BETA_START, NUM_TIMESTEPS

    is_epsilon = process.prediction == "epsilon"
    return {
        "_class_name": "EulerDiscreteScheduler",
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": NUM_TIMESTEPS,
        "prediction_type": "sample" if process.prediction == "x0" else process.prediction,
        "rescale_betas_zero_snr": process.zero_terminal_snr,
        "timestep_spacing": "leading" if is_epsilon else "trailing",
        "steps_offset": 1 if is_epsilon else 0,
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
    }


def read_scheduler(path: Path, config: Mapping[str, Any], latents: LatentScaling, *, folded: bool) -> Process:
    """The process of a diffusers folder, from its scheduler's config. Raises ModelFileError for one that is none of ours."""
    prediction, kind = str(config.get("prediction_type", "epsilon")), str(config.get("_class_name"))
    if prediction == "flow_prediction" or "FlowMatch" in kind:
        return Process("flow", latents=latents, folded=folded, declared=True)
    if "EDM" in kind:
        sigmas = float(config.get("sigma_min", EDM_VE_SIGMAS[0])), float(config.get("sigma_max", EDM_VE_SIGMAS[1]))
        is_v = prediction == "v_prediction"
        sigma_data = float(config.get("sigma_data", EDM_SIGMA_DATA))
        if sigma_data == (1.0 if is_v else EDM_SIGMA_DATA) and 0 < sigmas[0] < sigmas[1]:
            return Process("v_prediction" if is_v else "edm", edm_ve_sigmas=sigmas, latents=latents, folded=folded, declared=True)
    predictions: dict[str, Any] = {"epsilon": "epsilon", "v_prediction": "v_prediction", "sample": "x0"}
    if prediction not in predictions or "EDM" in kind:
        raise ModelFileError(
            f"{path} asks for another kind of noise than SDXL's ({kind}, {prediction})",
            hint="choose SDXL 1.0 base or a model made from it, as one .safetensors file or as a diffusers folder",
        )
    terminal = prediction != "epsilon" and bool(config.get("rescale_betas_zero_snr", False))
    return Process(predictions[prediction], terminal, latents=latents, folded=folded, declared=prediction != "epsilon")


def read_latent_scaling(folder: Path, config: Mapping[str, Any]) -> LatentScaling:
    """How the latents of a diffusers autoencoder are scaled: SDXL's way or Playground's. Raises ModelFileError for others."""
    factor, mean, std = config.get("scaling_factor", SDXL_SCALING.factor[0]), config.get("latents_mean"), config.get("latents_std")
    if mean is None and _close((factor,), SDXL_SCALING.factor[:1], 1e-6):
        return SDXL_SCALING
    if mean is not None and std is not None and factor == PLAYGROUND_FACTOR and _close(mean, RAW_MEAN) and _close(std, RAW_STD):
        return PLAYGROUND_SCALING
    raise ModelFileError(
        f"the VAE in {folder} is not SDXL's: its latents are scaled differently",
        hint=f"choose a VAE with the scaling factor {SDXL_SCALING.factor[0]}; those of SD 1.5 have the same sizes but another meaning",
    )


def vae_config(process: Process) -> dict[str, Any]:
    """What the config of a diffusers autoencoder says beside its sizes, where that differs from SDXL's."""
    if process.latents != PLAYGROUND_SCALING:
        return {}
    return {"scaling_factor": PLAYGROUND_FACTOR, "latents_mean": list(RAW_MEAN), "latents_std": list(RAW_STD)}


def _close(values: Any, expected: tuple[float, ...], tolerance: float = _SAME) -> bool:
    numbers = [float(value) for value in values]
    return len(numbers) == len(expected) and all(abs(a - b) <= tolerance for a, b in zip(numbers, expected, strict=True))
