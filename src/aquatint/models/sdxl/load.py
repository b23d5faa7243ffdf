"""Opening a base model: what it is, whether it is whole, and its weights, read straight into the modules that use them.

A base is one safetensors file in the official layout, or a diffusers folder. Opening reads headers and configs only and
imports no torch; weights are read one tensor at a time, so memory holds the model plus its largest tensor.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from aquatint.errors import ModelFileError
from aquatint.models.sdxl import detect
from aquatint.models.sdxl.keys import original_shapes
from aquatint.models.sdxl.markers import read_latent_scaling, read_markers, read_scheduler
from aquatint.models.sdxl.model import ModelSpec, build_text_encoders, build_unet, build_vae, count_positions, sdxl_spec
from aquatint.models.sdxl.places import Place, folder_places, official_places, read_json, vae_places
from aquatint.models.sdxl.process import Process
from aquatint.models.sdxl.shapes import CARRIED, COMPONENTS, Component, Shape, qualified
from aquatint.tensor_file import LazyTensor, TensorFile, as_bytes, torch_dtype

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from aquatint.models.sdxl.conditioning import TextEncoders
    from aquatint.models.sdxl.model import VaeEncoder

SPEC_KEY = "aquatint.model_spec"  # metadata of a file whose networks do not have SDXL's sizes
FOLDED_KEY = "_aquatint_folded_latents"  # in model_index.json: see `Process.folded`
LOGIT_SCALE = 4.6052  # ln 100, where CLIP's training stops it: for a base that lost the tensor
Digested = Literal["unet", "vae", "vae_encoder", "text_encoders"]
DIGESTED: Mapping[Digested, tuple[Component, ...]] = MappingProxyType(
    {"unet": ("unet",), "vae": ("vae",), "vae_encoder": ("vae",), "text_encoders": ("text_encoder", "text_encoder_2")}
)
Change = Callable[[Any], Mapping[str, Callable[[Any], None]]]
ENCODES = ("encoder.", "quant_conv.")  # the tensors of an autoencoder that latents come from
MAX_LAYERS = 100  # of one stack: a damaged file may claim any number


@dataclass(frozen=True)
class BaseModel:
    """An opened base model. Nothing is loaded until it is asked for."""

    path: Path
    spec: ModelSpec
    layout: Literal["single_file", "diffusers"]
    process: Process
    """What the UNet was trained for, as far as the files tell; SDXL's own epsilon if they do not."""
    places: Mapping[Component, Mapping[str, Place]] = field(repr=False)
    _digests: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def load_unet(self, dtype: torch.dtype | None = None, change: Change | None = None) -> UNet2DConditionModel:
        """The UNet on the CPU, in its file's dtype or the given one. Raises ModelFileError for weights that are not finite.

        `change` may put other modules into it before it has weights. It returns what is to be called with a weight in its file's dtype,
        by the weight's name, for those that the UNet no longer holds.
        """
        unet = build_unet(self.spec)
        takers = change(unet) if change is not None else {}
        self._load_into(unet, "unet", dtype)
        reader = _Reader(self.places["unet"], self.spec.shapes("unet"))
        for name, take in takers.items():
            weight = reader.read(name)
            _check_finite(weight, self.places["unet"][name])
            take(weight)
        return unet.eval()

    def load_vae(self, dtype: torch.dtype | None = None) -> AutoencoderKL:
        """The autoencoder on the CPU, frozen."""
        vae = build_vae(self.spec)
        self._load_into(vae, "vae", dtype)
        return vae.eval().requires_grad_(False)

    def load_text_encoders(self, dtype: torch.dtype | None = None) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
        """CLIP-L and OpenCLIP bigG on the CPU, frozen."""
        clip, bigg = build_text_encoders(self.spec)
        self._load_into(clip, "text_encoder", dtype)
        self._load_into(bigg, "text_encoder_2", dtype)
        count_positions(clip, bigg)
        return clip.eval().requires_grad_(False), bigg.eval().requires_grad_(False)

    def vae_encoder(self, device: torch.device | str, precision: Literal["float32", "bfloat16"]) -> VaeEncoder:
        """What the cache encodes pictures with."""
        from aquatint.models.sdxl.model import VaeEncoder

        def load(name: str) -> AutoencoderKL:
            return self.load_vae(_dtype(name)).to(device)

        precise = None if precision == "float32" else partial(load, "float32")
        return VaeEncoder(load(precision), digest=self.digest("vae_encoder"), load_precise=precise)

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

    def tensors(self, components: Iterable[Component]) -> dict[str, LazyTensor]:
        """The tensors of several networks, by the names that they are trained under."""
        return {qualified(one, name): tensor for one in components for name, tensor in self.component(one).items()}

    def digest(self, component: Digested) -> str:
        """SHA-256 over names, dtypes, shapes and bytes, the same for a single file and a diffusers folder. Computed once.

        `vae_encoder` is what latents depend on: another decoder leaves them as they are.
        """
        if component not in self._digests:
            self._digests[component] = self._compute_digest(component)
        return self._digests[component]

    def _compute_digest(self, component: Digested) -> str:
        digest = hashlib.sha256()
        for part in DIGESTED[component]:
            for name, value in sorted(self.component(part).items()):
                if name != CARRIED.get(part) and (component != "vae_encoder" or name.startswith(ENCODES)):
                    digest.update(f"{part} {name} {value.dtype} {value.shape}\n".encode())
                    digest.update(as_bytes(value.load()))
        return digest.hexdigest()

    def _load_into(self, module: torch.nn.Module, component: Component, dtype: torch.dtype | None) -> None:
        """Gives a module on the meta device its weights: each is read where it stays."""
        reader = _Reader(self.places[component], self.spec.shapes(component))
        tensors = {}
        for name in module.state_dict():
            tensors[name] = reader.read(name, dtype)
            _check_finite(tensors[name], self.places[component][name])
        module.load_state_dict(tensors, assign=True)


def open_base(path: Path, vae: Path | None = None) -> BaseModel:
    """Opens a base model, with another autoencoder if `vae` is given. Torch-free.

    Raises ModelFileError, with what the file is and what to use instead, for anything that is not a whole SDXL base.
    """
    path = Path(path)
    if not path.exists():
        raise ModelFileError(
            f"there is no file or folder {path}", hint="check the spelling of `model.base`; relative paths start at the config file"
        )
    base = _open_folder(path, need_vae=vae is None) if path.is_dir() else _open_single_file(path, need_vae=vae is None)
    return base if vae is None else replace(base, places={**base.places, "vae": vae_places(Path(vae), base.spec)})


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
        tensors, metadata, process = file.tensors, file.metadata, read_markers(file)
    detect.refuse_other_models(path, tensors, need_vae=need_vae)
    spec = _spec_of(path, metadata)
    places = {component: official_places(path, tensors, component, spec) for component in _needed(need_vae)}
    return BaseModel(path, spec, "single_file", process, places)


def _open_folder(folder: Path, *, need_vae: bool) -> BaseModel:
    index = _read_index(folder)
    detect.refuse_other_pipelines(folder, index)
    configs = {component: read_json(folder / component / "config.json") for component in _needed(need_vae)}
    official = sdxl_spec()
    detect.refuse_other_unet_config(folder, configs["unet"], official.unet)
    scaling = read_latent_scaling(folder, configs.get("vae", {}))
    known = {component: _known(configs.get(component, {}), getattr(official, component)) for component in COMPONENTS}
    spec = _workable(folder, ModelSpec(**known))
    places = {component: folder_places(folder / component, component, spec) for component in configs}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    config = read_json(scheduler) if scheduler.is_file() else {}
    return BaseModel(folder, spec, "diffusers", read_scheduler(scheduler, config, scaling, folded=bool(index.get(FOLDED_KEY))), places)


def _needed(need_vae: bool) -> tuple[Component, ...]:
    return tuple(component for component in COMPONENTS if need_vae or component != "vae")


def _read_index(folder: Path) -> dict[str, Any]:
    if (folder / "model_index.json").is_file():
        return read_json(folder / "model_index.json")
    checkpoints = sorted(folder.glob("*.safetensors"))
    if (folder.parent / "model_index.json").is_file():
        raise ModelFileError(f"{folder} is only one part of a diffusers model", hint=f"choose the folder above it, {folder.parent}")
    if checkpoints:
        raise ModelFileError(f"{folder} is a folder of model files, not a model", hint=f"choose one of them, such as {checkpoints[0]}")
    what = "is not a diffusers model: it has no model_index.json" if any(folder.iterdir()) else "is an empty folder"
    raise ModelFileError(f"{folder} {what}", hint=detect.USE_SDXL)


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
        depths = [*spec.unet["transformer_layers_per_block"], spec.unet["layers_per_block"], spec.vae["layers_per_block"]]
        if max(*depths, spec.text_encoder["num_hidden_layers"], spec.text_encoder_2["num_hidden_layers"]) > MAX_LAYERS:
            raise ValueError(f"more than {MAX_LAYERS} layers")
        original_shapes(spec)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ModelFileError(f"{path} describes a model that cannot be built: {error!r}", hint=detect.USE_SDXL) from error
    return spec


def _known(config: Mapping[str, Any], official: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that decides what the network computes, with SDXL's values where it is silent."""
    token_ids = ("bos_token_id", "eos_token_id", "pad_token_id")  # of no effect here, and wrong in many files
    return {key: value if key in token_ids else config.get(key, value) for key, value in official.items()}


def _synthesised(name: str, shape: Shape) -> torch.Tensor:
    """The official tensors that no module uses, for a base that does not have them."""
    import torch

    if name == CARRIED["text_encoder"]:
        return torch.arange(prod(shape)).reshape(shape)
    return torch.tensor(LOGIT_SCALE)


def _check_finite(tensor: torch.Tensor, place: Place) -> None:
    import torch

    if tensor.itemsize > 1 and not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise ModelFileError(
            f"`{place.origin.name}` in {place.path} has values that are not finite in {str(tensor.dtype).removeprefix('torch.')}",
            hint="the file is damaged or was saved from a failed training: choose another copy or an earlier version of the model",
        )


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
