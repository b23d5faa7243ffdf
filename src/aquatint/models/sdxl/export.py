"""A trained model as one file for ComfyUI, A1111 and Forge, or as a diffusers folder.

Both are written tensor by tensor and read back before they count as done. What was not trained is copied from the base as
it is. A single file says by marker tensors how to sample it (see `markers`) and by ModelSpec 1.0.1 metadata
(github.com/Stability-AI/ModelSpec) what it is. A model of standardised latents gets an autoencoder that has the standardisation inside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aquatint.diffusion.standardise import LatentConvs, fold_standardisation
from aquatint.errors import NumericalError, StorageError
from aquatint.models.sdxl.keys import PREFIXES, Piece, original_layout, published_name, stored_shape
from aquatint.models.sdxl.load import FOLDED_KEY, SPEC_KEY, BaseModel, open_base
from aquatint.models.sdxl.markers import markers, process_note, scheduler_config, usage_hint, vae_config
from aquatint.models.sdxl.model import ModelSpec, sdxl_spec
from aquatint.models.sdxl.places import vae_places
from aquatint.models.sdxl.process import RAW_MEAN, RAW_STD, SDXL_SCALING, STANDARDISED, VAE_SCALING_FACTOR, Process
from aquatint.models.sdxl.shapes import CARRIED, COMPONENTS, Component, by_component
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
    process: Process,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes the base with another UNet (internal names, any dtype and device), and returns the SHA-256 of its data in hex.

    It may have whole text encoders beside it, whose names have the encoder before them. `metadata` comes on top of what
    `modelspec_metadata` says. Raises NumericalError when a weight does not fit in `dtype`.
    """
    return write_single_file(path, base.spec, _components(base, unet, dtype, process), process=_told(process), metadata=metadata)


def write_single_file(
    path: Path,
    spec: ModelSpec,
    components: Mapping[Component, Tensors],
    *,
    process: Process,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes four networks (internal names) in the official layout and checks the file. Returns its data's SHA-256 in hex."""
    tensors: dict[str, Tensor | LazyTensor] = {
        name: _official_tensor(pieces, [components[piece.component][piece.name] for piece in pieces])
        for name, pieces in original_layout(spec).items()
    }
    tensors |= markers(process)
    strings = {**modelspec_metadata(title=path.stem, process=process), **process_note(process), **(metadata or {})}
    if not spec.same_sizes(sdxl_spec()):
        strings[SPEC_KEY] = json.dumps(asdict(spec))
    digest = write_tensors(path, tensors, strings, data_digest_key="modelspec.hash_sha256")
    _check(path, spec, process)
    return digest


def export_decoder(path: Path, base: BaseModel, decoder: Tensors, *, dtype: torch.dtype, metadata: Mapping[str, str] | None = None) -> str:
    """Writes the base with other tensors in its autoencoder, and returns the SHA-256 of its data. All else is copied as it is."""
    components: dict[Component, Tensors] = {component: base.component(component) for component in COMPONENTS}
    components["vae"] = {**components["vae"], **_cast(decoder, dtype)}
    return write_single_file(path, base.spec, components, process=base.process, metadata=metadata)


def export_vae(path: Path, base: BaseModel, decoder: Tensors, *, dtype: torch.dtype) -> None:
    """The same as an autoencoder alone, for UIs' folders of VAEs: original names without their prefix. Read back as a check."""
    vae: dict[str, Tensor | LazyTensor] = {**base.component("vae"), **_cast(decoder, dtype)}
    layout = {name: pieces for name, pieces in original_layout(base.spec).items() if pieces[0].component == "vae"}
    tensors = {name.removeprefix(PREFIXES["vae"]): _official_tensor(pieces, [vae[pieces[0].name]]) for name, pieces in layout.items()}
    write_tensors(path, tensors, {"format": "pt", "modelspec.title": path.stem})
    vae_places(path, base.spec)


def modelspec_metadata(
    *,
    title: str,
    process: Process,
    author: str | None = None,
    license: str | None = None,
    date: str | None = None,
    resolution: str = "1024x1024",
) -> dict[str, str]:
    """ModelSpec 1.0.1 metadata of an SDXL checkpoint; `date` is ISO 8601. The data's hash is added when the file is written."""
    prediction_type = {"epsilon": "epsilon", "v_prediction": "v"}.get(process.prediction)  # ModelSpec knows no others
    optional = {
        "author": author, "license": license, "date": date, "usage_hint": usage_hint(process), "prediction_type": prediction_type,
    }  # fmt: skip
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "sgm",
        "modelspec.title": title,
        "modelspec.resolution": resolution,
        **{f"modelspec.{key}": value for key, value in optional.items() if value is not None},
    }


def export_diffusers(folder: Path, base: BaseModel, unet: Tensors, *, dtype: torch.dtype, process: Process) -> None:
    """Writes a new folder for `StableDiffusionXLPipeline.from_pretrained`, and as `config=` of its `from_single_file`."""
    told = _told(process)
    extra: dict[Component, dict[str, Any]] = {"vae": vae_config(told)}
    index = _MODEL_INDEX | {"scheduler": ["diffusers", scheduler_config(told)["_class_name"]]} | ({FOLDED_KEY: True} if told.folded else {})
    with atomic_folder(folder) as part:
        for component, tensors in _components(base, unet, dtype, process).items():
            stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
            named = {published_name(component, name): tensor for name, tensor in tensors.items() if name != CARRIED.get(component)}
            write_tensors(part / component / f"{stem}.safetensors", named, {"format": "pt"})
            write_json(
                part / component / "config.json", {**_CLASSES[component], **getattr(base.spec, component), **extra.get(component, {})}
            )
        write_json(part / "scheduler" / "scheduler_config.json", scheduler_config(told))
        write_tokenizer_folder(part / "tokenizer", PAD)
        write_tokenizer_folder(part / "tokenizer_2", PAD_2)
        write_json(part / "model_index.json", index)
        _check(part, base.spec, told)


def _told(process: Process) -> Process:
    """The process as the file is to be read: standardised latents are SDXL's own under the autoencoder that goes with them."""
    return replace(process, latents=SDXL_SCALING, folded=True) if process.latents == STANDARDISED else process


def _components(base: BaseModel, unet: Tensors, dtype: torch.dtype, process: Process) -> dict[Component, Tensors]:
    """The four networks as they are written, in the order of COMPONENTS."""
    components: dict[Component, Tensors] = {component: base.component(component) for component in COMPONENTS}
    for component, tensors in by_component(unet).items():
        carried = {name: tensor for name, tensor in components[component].items() if name == CARRIED.get(component)}
        components[component] = {**_cast({name: tensor for name, tensor in tensors.items() if name not in carried}, dtype), **carried}
    if process.latents == STANDARDISED:
        components["vae"] = {**components["vae"], **_folded_convs(components["vae"])}
    return components


def _folded_convs(vae: Tensors) -> dict[str, Tensor]:
    """The convolutions beside the latents, with the standardisation inside."""
    names = [f"{conv}.{part}" for conv in ("quant_conv", "post_quant_conv") for part in ("weight", "bias")]
    mean, std = torch.tensor(RAW_MEAN), torch.tensor(RAW_STD)
    return dict(
        zip(names, fold_standardisation(LatentConvs(*(_load(vae[name]) for name in names)), mean, std, VAE_SCALING_FACTOR), strict=True)
    )


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


def _same(one: Process, other: Process) -> bool:
    """Whether two files are sampled alike; numbers are written as float32."""
    ends = [process.edm_ve_sigmas and tuple(f"{end:.6g}" for end in process.edm_ve_sigmas) for process in (one, other)]
    return ends[0] == ends[1] and replace(one, declared=False, edm_ve_sigmas=None) == replace(other, declared=False, edm_ve_sigmas=None)


def _check(path: Path, spec: ModelSpec, process: Process) -> None:
    """Opens what was written: every tensor is there in its shape, and it says what it is. Raises StorageError if not."""
    written = open_base(path)
    if not written.spec.same_sizes(spec) or not _same(written.process, process):
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
