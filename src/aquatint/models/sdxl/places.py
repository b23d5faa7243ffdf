"""Where the tensors of a model lie: in a file of the official layout, in a diffusers folder, in a VAE of its own.

Looks at headers only, and checks that every tensor is there in its shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aquatint.errors import ModelFileError
from aquatint.models.sdxl import detect
from aquatint.models.sdxl.keys import PREFIXES, Origin, is_vae_matrix, stored_shape, to_original
from aquatint.models.sdxl.markers import read_latent_scaling
from aquatint.models.sdxl.model import ModelSpec
from aquatint.models.sdxl.process import SDXL_SCALING
from aquatint.models.sdxl.shapes import CARRIED, Component, Shape
from aquatint.storage import storage_errors
from aquatint.tensor_file import TensorFile, TensorInfo

_MAX_NAMED = 5
_INCOMPLETE = "the download may be incomplete: fetch the folder again"


@dataclass(frozen=True)
class Place:
    """Where an internal tensor lies: a tensor of a file, and which part or form of it."""

    path: Path
    info: TensorInfo
    origin: Origin


def official_places(path: Path, tensors: detect.Tensors, component: Component, spec: ModelSpec) -> dict[str, Place]:
    """Internal name -> place, in a file of the official layout. Raises ModelFileError for missing and misshapen tensors."""
    origins = {name: to_original(component, name) for name in spec.shapes(component)}
    return _checked(path, component, spec, origins, {name: (path, info) for name, info in tensors.items()})


def folder_places(folder: Path, component: Component, spec: ModelSpec) -> dict[str, Place]:
    """Internal name -> place, in one component's folder of a diffusers model: one file or several shards."""
    tensors: dict[str, tuple[Path, TensorInfo]] = {}
    for path in _weight_files(folder):
        with TensorFile(path) as file:
            tensors |= {name: (path, info) for name, info in file.tensors.items()}
    return _checked(folder, component, spec, _diffusers_origins(component, spec, tensors), tensors)


def vae_places(path: Path, spec: ModelSpec) -> dict[str, Place]:
    """Internal name -> place of another VAE: a diffusers folder, a file of its own in either spelling, or a full checkpoint."""
    if not path.exists():
        hint = "check the spelling of `model.vae`; relative paths start at the config file"
        raise ModelFileError(f"there is no file or folder {path}", hint=hint)
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        if read_latent_scaling(folder, read_json(folder / "config.json")) != SDXL_SCALING:
            raise ModelFileError(
                f"the VAE in {folder} is for Playground's scaling of the latents", hint="choose an SDXL VAE, or leave out `model.vae`"
            )
        return folder_places(folder, "vae", spec)
    detect.refuse_container(path)
    with TensorFile(path) as file:
        tensors = {name: (path, info) for name, info in file.tensors.items()}
    if any(name.startswith("cond_stage_model.") for name in tensors):
        raise ModelFileError(f"the VAE in {path} is not SDXL's: the file is a Stable Diffusion 1 or 2 model", hint="choose an SDXL VAE")
    return _checked(path, "vae", spec, _vae_origins(path, spec, tensors), tensors)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table. Raises ModelFileError if the file is missing or is none."""
    if not path.is_file():
        raise ModelFileError(f"{path} is missing", hint=_INCOMPLETE)
    with storage_errors("read", path):
        data = path.read_bytes()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not readable JSON: {error}", hint=_INCOMPLETE) from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} is not a JSON table", hint=_INCOMPLETE)
    return value


def _vae_origins(path: Path, spec: ModelSpec, tensors: Mapping[str, Any]) -> dict[str, Origin]:
    """Where a file of any of the usual spellings should have the autoencoder's tensors."""
    prefix = PREFIXES["vae"]
    official = {name: to_original("vae", name) for name in spec.shapes("vae")}
    if f"{prefix}encoder.conv_in.weight" in tensors:
        return official
    if "encoder.conv_in.weight" not in tensors:
        raise ModelFileError(f"{path} holds no VAE", hint="set `model.vae` to an SDXL VAE, or leave it out to use the base model's own")
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        return _diffusers_origins("vae", spec, tensors)
    return {name: replace(origin, name=origin.name.removeprefix(prefix)) for name, origin in official.items()}


def _diffusers_origins(component: Component, spec: ModelSpec, tensors: Mapping[str, Any]) -> dict[str, Origin]:
    """Internal name -> stored name, whichever version of diffusers and transformers wrote the file."""
    stored = {_modern_name(component, name): name for name in tensors}
    return {name: Origin(stored.get(name, name), as_conv=component == "vae" and is_vae_matrix(name)) for name in spec.shapes(component)}


def _modern_name(component: Component, name: str) -> str:
    if component == "text_encoder":
        return name.removeprefix("text_model.")
    if component == "vae" and ".attentions." in name:
        for old, new in {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}.items():
            name = name.replace(old, new)
    return name


def _checked(
    path: Path,
    component: Component,
    spec: ModelSpec,
    origins: Mapping[str, Origin],
    tensors: Mapping[str, tuple[Path, TensorInfo]],
) -> dict[str, Place]:
    """The places of a component's tensors, all of them there and in the right shape."""
    places: dict[str, Place] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    for name, shape in spec.shapes(component).items():
        origin = origins[name]
        if origin.name in tensors:
            places[name] = Place(tensors[origin.name][0], tensors[origin.name][1], origin)
            if not _fits(places[name], shape):
                found = list(places[name].info.shape)
                misshapen.append(f"`{origin.name}` is {found} instead of {list(stored_shape(origin, shape))}")
        elif name != CARRIED.get(component):
            missing.append(origin.name)
    if missing:
        raise ModelFileError(f"{path} lacks {_some(missing)}", hint=f"the file is incomplete or of another model: {detect.USE_SDXL}")
    if misshapen:
        more = f", and {len(misshapen) - 1} more tensors differ" if len(misshapen) > 1 else ""
        raise ModelFileError(f"{path} does not have SDXL's sizes: {misshapen[0]}{more}", hint=detect.USE_SDXL)
    return places


def _fits(place: Place, shape: Shape) -> bool:
    """Some programs write the autoencoder's attention as matrices in one layout, or as convolutions in the other."""
    return place.info.shape == stored_shape(place.origin, shape) or (place.origin.as_conv and place.info.shape == shape)


def _weight_files(folder: Path) -> list[Path]:
    for variant in ("", ".fp16", ".bf16"):
        for stem in ("diffusion_pytorch_model", "model"):
            if (folder / f"{stem}{variant}.safetensors").is_file():
                return [folder / f"{stem}{variant}.safetensors"]
            if shards := sorted(folder.glob(f"{stem}{variant}-*-of-*.safetensors")):
                return shards
    if list(folder.glob("*.bin")):
        what = "holds only pickle files, which can run any program when they are opened"
        raise ModelFileError(f"{folder} {what}", hint="download the .safetensors version of the model")
    raise ModelFileError(f"{folder} holds no .safetensors weights", hint=_INCOMPLETE)


def _some(names: list[str]) -> str:
    """How many there are, and the first few. A fused tensor is wanted three times and named once."""
    names = list(dict.fromkeys(names))
    shown = ", ".join(f"`{name}`" for name in names[:_MAX_NAMED])
    rest = len(names) - _MAX_NAMED
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}: {shown}" + (f" and {rest} more" if rest > 0 else "")
