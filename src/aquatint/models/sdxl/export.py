"""A trained model as one file for ComfyUI, A1111 and Forge, or as a diffusers folder.

Both are written tensor by tensor and read back before they count as done. What was not trained is copied from the base as
it is. A single file says by two empty tensors how to sample it (`v_pred`, `ztsnr`: what those programs look for) and by
ModelSpec 1.0.1 metadata (github.com/Stability-AI/ModelSpec) what it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aquatint.diffusion.parameterization import Prediction
from aquatint.diffusion.schedule import BETA_END, BETA_START, NUM_TIMESTEPS
from aquatint.errors import NumericalError, StorageError
from aquatint.models.sdxl.keys import Piece, original_layout, stored_shape
from aquatint.models.sdxl.load import SPEC_KEY, BaseModel, open_base
from aquatint.models.sdxl.model import ModelSpec, sdxl_spec
from aquatint.models.sdxl.shapes import CARRIED, COMPONENTS, Component
from aquatint.models.sdxl.tokenizer import PAD, PAD_2, write_tokenizer_folder
from aquatint.storage import atomic_folder, write_json
from aquatint.tensor_file import LazyTensor, write_tensors

Tensors = Mapping[str, Tensor | LazyTensor]


def export_single_file(
    path: Path,
    base: BaseModel,
    unet: Tensors,
    *,
    dtype: torch.dtype,
    prediction: Prediction,
    zero_terminal_snr: bool,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes the base with another UNet (internal names, any dtype and device), and returns the SHA-256 of its data in hex.

    `metadata` comes on top of what `modelspec_metadata` says. Raises NumericalError when a weight does not fit in `dtype`.
    """
    components = {component: base.component(component) for component in COMPONENTS if component != "unet"}
    return write_single_file(
        path,
        base.spec,
        {**components, "unet": _cast(unet, dtype)},
        prediction=prediction,
        zero_terminal_snr=zero_terminal_snr,
        metadata=metadata,
    )


def write_single_file(
    path: Path,
    spec: ModelSpec,
    components: Mapping[Component, Tensors],
    *,
    prediction: Prediction,
    zero_terminal_snr: bool,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes four networks (internal names) in the official layout and checks the file. Returns its data's SHA-256 in hex."""
    tensors: dict[str, Tensor | LazyTensor] = {
        name: _official_tensor(pieces, [components[piece.component][piece.name] for piece in pieces])
        for name, pieces in original_layout(spec).items()
    }
    tensors |= {marker: torch.zeros(0) for marker in _markers(prediction, zero_terminal_snr)}
    strings = {**modelspec_metadata(title=path.stem, prediction=prediction, zero_terminal_snr=zero_terminal_snr), **(metadata or {})}
    if not spec.same_sizes(sdxl_spec()):
        strings[SPEC_KEY] = json.dumps(asdict(spec))
    digest = write_tensors(path, tensors, strings, data_digest_key="modelspec.hash_sha256")
    _check(path, spec, prediction, zero_terminal_snr)
    return digest


def modelspec_metadata(
    *,
    title: str,
    prediction: Prediction,
    zero_terminal_snr: bool,
    author: str | None = None,
    license: str | None = None,
    date: str | None = None,
    resolution: str = "1024x1024",
) -> dict[str, str]:
    """ModelSpec 1.0.1 metadata of an SDXL checkpoint; `date` is ISO 8601. The data's hash is added when the file is written."""
    optional = {"author": author, "license": license, "date": date}
    if prediction == "v_prediction":
        noise = " with zero terminal SNR" if zero_terminal_snr else ""
        optional["usage_hint"] = f"v-prediction{noise}: programs that know the v_pred and ztsnr markers set themselves up"
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "sgm",
        "modelspec.title": title,
        "modelspec.resolution": resolution,
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
        **{f"modelspec.{key}": value for key, value in optional.items() if value is not None},
    }


def export_diffusers(
    folder: Path, base: BaseModel, unet: Tensors, *, dtype: torch.dtype, prediction: Prediction, zero_terminal_snr: bool
) -> None:
    """Writes a new folder for `StableDiffusionXLPipeline.from_pretrained`, and as `config=` of its `from_single_file`."""
    with atomic_folder(folder) as part:
        for component in COMPONENTS:
            tensors = _cast(unet, dtype) if component == "unet" else base.component(component)
            stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
            named = {_folder_name(component, name): tensor for name, tensor in tensors.items() if name != CARRIED.get(component)}
            write_tensors(part / component / f"{stem}.safetensors", named, {"format": "pt"})
            write_json(part / component / "config.json", {**_CLASSES[component], **getattr(base.spec, component)})
        write_json(part / "scheduler" / "scheduler_config.json", scheduler_config(prediction, zero_terminal_snr))
        write_tokenizer_folder(part / "tokenizer", PAD)
        write_tokenizer_folder(part / "tokenizer_2", PAD_2)
        write_json(part / "model_index.json", _MODEL_INDEX)
        _check(part, base.spec, prediction, zero_terminal_snr)


def scheduler_config(prediction: Prediction, zero_terminal_snr: bool) -> dict[str, Any]:
    """The scheduler that samples the model rightly in diffusers.

    v-prediction models start at the last timestep (arXiv 2305.08891, section 3.3); epsilon models keep SDXL's own setting.
    """
    is_v = prediction == "v_prediction"
    return {
        "_class_name": "EulerDiscreteScheduler",
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": NUM_TIMESTEPS,
        "prediction_type": prediction,
        "rescale_betas_zero_snr": zero_terminal_snr,
        "timestep_spacing": "trailing" if is_v else "leading",
        "steps_offset": 0 if is_v else 1,
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
    }


def _markers(prediction: Prediction, zero_terminal_snr: bool) -> list[str]:
    if prediction != "v_prediction":
        return []
    return ["v_pred", "ztsnr"] if zero_terminal_snr else ["v_pred"]


def _official_tensor(pieces: tuple[Piece, ...], values: list[Tensor | LazyTensor]) -> LazyTensor:
    """An official tensor that is put together from its internal pieces when it is written."""
    shape = stored_shape(pieces[0].origin, tuple(values[0].shape))
    return LazyTensor(values[0].dtype, shape, partial(_assemble, values, shape, transposed=pieces[0].origin.transposed))


def _assemble(values: list[Tensor | LazyTensor], shape: tuple[int, ...], *, transposed: bool) -> Tensor:
    tensors = [_load(value) for value in values]
    tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return tensor.t().contiguous() if transposed else tensor.reshape(shape)


def _load(value: Tensor | LazyTensor) -> Tensor:
    return value.load() if isinstance(value, LazyTensor) else value.detach().cpu()


def _cast(tensors: Tensors, dtype: torch.dtype) -> dict[str, LazyTensor]:
    return {name: LazyTensor(dtype, tuple(value.shape), partial(_load_as, name, value, dtype)) for name, value in tensors.items()}


def _load_as(name: str, value: Tensor | LazyTensor, dtype: torch.dtype) -> Tensor:
    tensor = _load(value).to(dtype)
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise NumericalError(
            f"the weight `{name}` does not fit in {str(dtype).removeprefix('torch.')}, or is not a finite number",
            hint='set `export.dtype` to "bfloat16" or "float32"; if that does not help, export an earlier checkpoint',
        )
    return tensor


def _folder_name(component: Component, name: str) -> str:
    """CLIP-L's names begin with `text_model.` in every published folder; transformers leaves it out since 5.6 and reads both."""
    return f"text_model.{name}" if component == "text_encoder" else name


def _check(path: Path, spec: ModelSpec, prediction: Prediction, zero_terminal_snr: bool) -> None:
    """Opens what was written: every tensor is there in its shape, and it says what it is. Raises StorageError if not."""
    written = open_base(path)
    if not written.spec.same_sizes(spec) or (written.prediction, written.zero_terminal_snr) != (prediction, zero_terminal_snr):
        raise StorageError(f"{path} does not read back as it was written", hint="check that the disk is healthy, then export again")


_MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "add_watermarker": None,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
}
_CLASSES: dict[Component, dict[str, Any]] = {
    "unet": {"_class_name": "UNet2DConditionModel"},
    "vae": {"_class_name": "AutoencoderKL"},
    "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
    "text_encoder_2": {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model"},
}
