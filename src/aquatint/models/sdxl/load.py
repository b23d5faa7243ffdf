"""Opening a base model: what it is, whether it is whole, and its weights, read straight into the modules that use them.

A base is one safetensors file in the official layout, or a diffusers folder. Opening reads headers and configs only and
imports no torch; weights are read one tensor at a time, so memory holds the model plus its largest tensor.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aquatint.errors import ModelFileError
from aquatint.models.sdxl import detect
from aquatint.models.sdxl.keys import PREFIXES, Origin, original_shapes, to_original
from aquatint.models.sdxl.model import VAE_SCALING_FACTOR, ModelSpec, build_text_encoders, build_unet, build_vae, sdxl_spec
from aquatint.models.sdxl.shapes import CARRIED, COMPONENTS, Component, Shape
from aquatint.storage import storage_errors
from aquatint.tensor_file import LazyTensor, TensorFile, TensorInfo, as_bytes, torch_dtype

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from aquatint.diffusion.parameterization import Prediction
    from aquatint.models.sdxl.conditioning import TextEncoders
    from aquatint.models.sdxl.model import VaeEncoder

SPEC_KEY = "aquatint.model_spec"  # metadata of a file whose networks do not have SDXL's sizes
LOGIT_SCALE = 4.6052  # ln 100, where CLIP's training stops it: for a base that lost the tensor
_MAX_NAMED = 5


@dataclass(frozen=True)
class Place:
    """Where an internal tensor lies: a tensor of a file, and which part or form of it."""

    path: Path
    info: TensorInfo
    origin: Origin


@dataclass(frozen=True)
class BaseModel:
    """An opened base model. Nothing is loaded until it is asked for."""

    path: Path
    spec: ModelSpec
    layout: Literal["single_file", "diffusers"]
    prediction: Prediction
    """What the UNet was trained to predict, as far as the files tell; epsilon if they do not."""
    zero_terminal_snr: bool
    places: Mapping[Component, Mapping[str, Place]] = field(repr=False)

    def load_unet(self, dtype: torch.dtype | None = None) -> UNet2DConditionModel:
        """The UNet on the CPU, in its file's dtype or the given one. Raises ModelFileError for weights that are not finite."""
        unet = build_unet(self.spec)
        self._load_into(unet, "unet", dtype)
        return unet.eval()

    def load_vae(self, dtype: torch.dtype | None = None) -> AutoencoderKL:
        """The autoencoder on the CPU, frozen."""
        vae = build_vae(self.spec)
        self._load_into(vae, "vae", dtype)
        return vae.eval().requires_grad_(False)

    def load_text_encoders(self, dtype: torch.dtype | None = None) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
        """CLIP-L and OpenCLIP bigG on the CPU, frozen."""
        import torch

        clip, bigg = build_text_encoders(self.spec)
        for module, embeddings, component in (clip, clip.embeddings, "text_encoder"), (bigg, bigg.text_model.embeddings, "text_encoder_2"):
            self._load_into(module, component, dtype)
            embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings).unsqueeze(0)  # not in the state dict
            module.eval().requires_grad_(False)
        return clip, bigg

    def vae_encoder(self, device: torch.device | str, precision: Literal["float32", "bfloat16"]) -> VaeEncoder:
        """What the cache encodes pictures with."""
        from aquatint.models.sdxl.model import VaeEncoder

        return VaeEncoder(self.load_vae(_dtype(precision)).to(device), digest=self.digest("vae"))

    def caption_encoder(self, device: torch.device | str) -> TextEncoders:
        """What captions and prompts are encoded with: both text encoders, in float32."""
        from aquatint.models.sdxl.conditioning import TextEncoders

        clip, bigg = self.load_text_encoders(_dtype("float32"))
        return TextEncoders(clip.to(device), bigg.to(device), digest=self.digest("text_encoders"))

    def component(self, component: Component) -> dict[str, LazyTensor]:
        """Internal name -> tensor of one network, in the file's dtype, read when its turn comes."""
        reader = _Reader(self.places[component], self.spec.shapes(component))
        return {
            name: LazyTensor(reader.dtype(name), shape, partial(reader.read, name)) for name, shape in self.spec.shapes(component).items()
        }

    def digest(self, component: Literal["unet", "vae", "text_encoders"]) -> str:
        """SHA-256 over names, dtypes, shapes and bytes, the same for a single file and a diffusers folder."""
        digest = hashlib.sha256()
        for part in COMPONENTS[2:] if component == "text_encoders" else (component,):
            for name, value in sorted(self.component(part).items()):
                if name != CARRIED.get(part):
                    digest.update(f"{part} {name} {value.dtype} {value.shape}\n".encode())
                    digest.update(as_bytes(value.load()))
        return digest.hexdigest()

    def _load_into(self, module: torch.nn.Module, component: Component, dtype: torch.dtype | None) -> None:
        """Gives a module on the meta device its weights: each is read where it stays."""
        reader = _Reader(self.places[component], self.spec.shapes(component))
        tensors = {}
        for name in module.state_dict():
            tensors[name] = reader.read(name, dtype)
            _check_finite(tensors[name], name, self.places[component][name])
        module.load_state_dict(tensors, assign=True)


def open_base(path: Path, vae: Path | None = None) -> BaseModel:
    """Opens a base model, with another autoencoder if `vae` is given. Torch-free.

    Raises ModelFileError, with what the file is and what to use instead, for anything that is not a whole SDXL base.
    """
    path = Path(path)
    if not path.exists():
        raise ModelFileError(f"there is no file or folder {path}", hint="check the spelling of `model.base`; relative paths start at the config file")
    base = _open_folder(path, need_vae=vae is None) if path.is_dir() else _open_single_file(path, need_vae=vae is None)
    return base if vae is None else replace(base, places={**base.places, "vae": _open_vae(Path(vae), base.spec)})


class _Reader:
    """Reads internal tensors. Files stay open until the reader is dropped, so that a lazy tensor can be read at any time."""

    def __init__(self, places: Mapping[str, Place], shapes: Mapping[str, Shape]) -> None:
        self._places = places
        self._shapes = shapes
        self._files: dict[Path, TensorFile] = {}

    def dtype(self, name: str) -> torch.dtype:
        if name in self._places:
            return torch_dtype(self._places[name].info.dtype)
        return _synthesised(name, self._shapes[name]).dtype

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor of its own memory. A plain one is read where it stays; a part or another form costs one copy."""
        import torch

        if name not in self._places:
            return _synthesised(name, self._shapes[name])
        place, shape = self._places[name], self._shapes[name]
        origin, stored = place.origin, torch_dtype(place.info.dtype)
        tensor = torch.empty(shape, dtype=dtype or stored)
        if tensor.dtype == stored and origin.part is None and not origin.transposed:
            self._file(place.path).read_into(origin.name, tensor)
            return tensor
        source = self._file(place.path).read(origin.name)
        if origin.part is not None:
            source = source[origin.part * shape[0] : (origin.part + 1) * shape[0]]
        return tensor.copy_(source.t() if origin.transposed else source.reshape(shape))

    def _file(self, path: Path) -> TensorFile:
        if path not in self._files:
            file = TensorFile(path)
            weakref.finalize(self, file.close)
            self._files[path] = file
        return self._files[path]


def _open_single_file(path: Path, *, need_vae: bool) -> BaseModel:
    detect.refuse_container(path)
    with TensorFile(path) as file:
        tensors, metadata = file.tensors, file.metadata
    detect.refuse_other_models(path, tensors, need_vae=need_vae)
    spec = _spec_of(path, metadata)
    needed = COMPONENTS if need_vae else tuple(component for component in COMPONENTS if component != "vae")
    places = _official_places(path, tensors, spec, needed)
    is_v = "v_pred" in tensors or metadata.get("modelspec.prediction_type", "").lower() in ("v", "v_prediction")
    prediction: Prediction = "v_prediction" if is_v else "epsilon"
    return BaseModel(path, spec, "single_file", prediction, is_v and "ztsnr" in tensors, places)


def _official_places(path: Path, tensors: detect.Tensors, spec: ModelSpec, needed: tuple[Component, ...]) -> dict[Component, dict[str, Place]]:
    """Where each internal tensor lies in a file of the official layout. Raises ModelFileError for missing and misshapen ones."""
    shapes = original_shapes(spec)
    places: dict[Component, dict[str, Place]] = {component: {} for component in needed}
    missing, misshapen = [], {}
    for component in needed:
        for name in spec.shapes(component):
            origin = to_original(component, name)
            info, shape = tensors.get(origin.name), shapes[origin.name]
            if info is not None and (info.shape == shape or (origin.as_conv and info.shape == shape[:2])):
                places[component][name] = Place(path, info, origin)
            elif info is not None:
                misshapen[origin.name] = (info.shape, shape)
            elif name != CARRIED.get(component):
                missing.append(origin.name)
    _refuse_broken(path, list(dict.fromkeys(missing)), misshapen)
    return places


def _open_folder(folder: Path, *, need_vae: bool) -> BaseModel:
    index = _read_index(folder)
    detect.refuse_other_pipelines(folder, index)
    needed = COMPONENTS if need_vae else tuple(component for component in COMPONENTS if component != "vae")
    configs = {component: _read_json(folder / component / "config.json") for component in needed}
    official = sdxl_spec()
    detect.refuse_other_configs(folder, {"vae": {}, **configs}, official.unet, VAE_SCALING_FACTOR)
    spec = ModelSpec(**{component: _known(configs.get(component, {}), getattr(official, component)) for component in COMPONENTS})
    places = {component: _folder_places(folder / component, component, _workable(folder, spec)) for component in needed}
    prediction, zero_terminal_snr = _read_scheduler(folder)
    return BaseModel(folder, spec, "diffusers", prediction, zero_terminal_snr, places)


def _read_index(folder: Path) -> dict[str, Any]:
    if (folder / "model_index.json").is_file():
        return _read_json(folder / "model_index.json")
    checkpoints = sorted(folder.glob("*.safetensors"))
    if (folder.parent / "model_index.json").is_file():
        raise ModelFileError(f"{folder} is only one part of a diffusers model", hint=f"choose the folder above it, {folder.parent}")
    if checkpoints:
        raise ModelFileError(f"{folder} is a folder of model files, not a model", hint=f"choose one of them, such as {checkpoints[0]}")
    what = "is not a diffusers model: it has no model_index.json" if any(folder.iterdir()) else "is an empty folder"
    raise ModelFileError(f"{folder} {what}", hint=detect.USE_SDXL)


def _folder_places(folder: Path, component: Component, spec: ModelSpec) -> dict[str, Place]:
    """Where each internal tensor lies in a component's folder, which may hold one file or several shards."""
    stored: dict[str, Place] = {}
    for path in _weight_files(folder):
        with TensorFile(path) as file:
            stored |= {_modern_name(component, name): Place(path, info, Origin(name)) for name, info in file.tensors.items()}
    return _checked(folder, component, spec, stored)


def _checked(path: Path, component: Component, spec: ModelSpec, stored: Mapping[str, Place]) -> dict[str, Place]:
    shapes = spec.shapes(component)
    places = {name: stored[name] for name in shapes if name in stored}
    missing = [name for name in shapes if name not in stored and name != CARRIED.get(component)]
    misshapen = {
        name: (place.info.shape, shapes[name]) for name, place in places.items() if not _same_shape(place.info.shape, shapes[name], component)
    }
    _refuse_broken(path, missing, misshapen)
    return places


def _same_shape(found: Shape, shape: Shape, component: Component) -> bool:
    return found == shape or (component == "vae" and len(shape) == 2 and found == (*shape, 1, 1))


def _weight_files(folder: Path) -> list[Path]:
    for variant in ("", ".fp16", ".bf16"):
        for stem in ("diffusion_pytorch_model", "model"):
            if (folder / f"{stem}{variant}.safetensors").is_file():
                return [folder / f"{stem}{variant}.safetensors"]
            if shards := sorted(folder.glob(f"{stem}{variant}-*-of-*.safetensors")):
                return shards
    if list(folder.glob("*.bin")):
        raise ModelFileError(
            f"{folder} holds only pickle files, which can run any program when they are opened",
            hint="download the .safetensors version of the model",
        )
    raise ModelFileError(f"{folder} holds no .safetensors weights", hint="the download may be incomplete: fetch the folder again")


def _modern_name(component: Component, name: str) -> str:
    """Names of older diffusers and transformers versions, in today's spelling."""
    if component == "text_encoder":
        return name.removeprefix("text_model.")
    if component == "vae" and ".attentions." in name:
        for old, new in {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}.items():
            name = name.replace(old, new)
    return name


def _open_vae(path: Path, spec: ModelSpec) -> dict[str, Place]:
    """Where an autoencoder's tensors lie: a diffusers folder, a file of its own in either spelling, or a full checkpoint."""
    if not path.exists():
        raise ModelFileError(f"there is no file or folder {path}", hint="check the spelling of `model.vae`; relative paths start at the config file")
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        detect.refuse_other_vae_config(folder, _read_json(folder / "config.json"), VAE_SCALING_FACTOR)
        return _folder_places(folder, "vae", spec)
    detect.refuse_container(path)
    with TensorFile(path) as file:
        tensors = file.tensors
    if any(name.startswith("cond_stage_model.") for name in tensors):
        raise ModelFileError(f"the VAE in {path} is not SDXL's: the file is a Stable Diffusion 1 or 2 model", hint="choose an SDXL VAE")
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in tensors:
        stored = {_modern_name("vae", name): Place(path, info, Origin(name)) for name, info in tensors.items()}
        return _checked(path, "vae", spec, stored)
    prefix = PREFIXES["vae"]
    if "encoder.conv_in.weight" in tensors:
        places = _official_places(path, {prefix + name: info for name, info in tensors.items()}, spec, ("vae",))["vae"]
        return {
            name: replace(place, origin=replace(place.origin, name=place.origin.name.removeprefix(prefix))) for name, place in places.items()
        }
    if f"{prefix}encoder.conv_in.weight" not in tensors:
        raise ModelFileError(f"{path} holds no VAE", hint="set `model.vae` to an SDXL VAE, or leave it out to use the base model's own")
    return _official_places(path, tensors, spec, ("vae",))["vae"]


def _spec_of(path: Path, metadata: Mapping[str, str]) -> ModelSpec:
    if SPEC_KEY not in metadata:
        return sdxl_spec()
    try:
        return _workable(path, ModelSpec(**json.loads(metadata[SPEC_KEY])))
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelFileError(f"{path} describes its own sizes wrongly in `{SPEC_KEY}`: {error}", hint=detect.USE_SDXL) from error


def _workable(path: Path, spec: ModelSpec) -> ModelSpec:
    """The spec, if shapes can be worked out from it. Its numbers come from a file that anyone may have written."""
    try:
        original_shapes(spec)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ModelFileError(f"{path} describes a model that cannot be built: {error!r}", hint=detect.USE_SDXL) from error
    return spec


def _known(config: Mapping[str, Any], official: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that decides what the network computes, with SDXL's values where it is silent."""
    token_ids = ("bos_token_id", "eos_token_id", "pad_token_id")  # of no effect here, and wrong in many files
    return {key: value if key in token_ids else config.get(key, value) for key, value in official.items()}


def _read_scheduler(folder: Path) -> tuple[Prediction, bool]:
    path = folder / "scheduler" / "scheduler_config.json"
    config = _read_json(path) if path.is_file() else {}
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction") or "Flow" in str(config.get("_class_name")) or "EDM" in str(config.get("_class_name")):
        raise ModelFileError(f"{path} asks for another kind of noise than SDXL's", hint=detect.USE_SDXL)
    return prediction, prediction == "v_prediction" and bool(config.get("rescale_betas_zero_snr", False))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelFileError(f"{path} is missing", hint="the download may be incomplete: fetch the folder again")
    with storage_errors("read", path):
        data = path.read_bytes()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not readable JSON: {error}", hint="the download may be incomplete: fetch the folder again") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} is not a JSON table", hint="the download may be incomplete: fetch the folder again")
    return value


def _refuse_broken(path: Path, missing: list[str], misshapen: Mapping[str, tuple[Shape, Shape]]) -> None:
    if missing:
        raise ModelFileError(f"{path} lacks {_some(missing)}", hint="the file is incomplete or of another model: " + detect.USE_SDXL)
    if misshapen:
        shapes = [f"`{name}` is {list(found)} instead of {list(wanted)}" for name, (found, wanted) in misshapen.items()]
        more = f", and {len(shapes) - 1} more tensors differ" if len(shapes) > 1 else ""
        raise ModelFileError(f"{path} does not have SDXL's sizes: {shapes[0]}{more}", hint=detect.USE_SDXL)


def _some(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:_MAX_NAMED])
    rest = len(names) - _MAX_NAMED
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}: {shown}" + (f" and {rest} more" if rest > 0 else "")


def _synthesised(name: str, shape: Shape) -> torch.Tensor:
    """The official tensors that no module uses, for a base that does not have them."""
    import torch

    if name == CARRIED["text_encoder"]:
        return torch.arange(prod(shape)).reshape(shape)
    return torch.tensor(LOGIT_SCALE)


def _check_finite(tensor: torch.Tensor, name: str, place: Place) -> None:
    import torch

    if tensor.itemsize > 1 and not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise ModelFileError(
            f"the tensor `{place.origin.name}` of {place.path} has values that are not finite in {str(tensor.dtype).removeprefix('torch.')}",
            hint="the file is damaged or was saved from a failed training: choose another copy or an earlier version of the model",
        )


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
