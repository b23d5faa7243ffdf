"""Reading LoRA files: kohya's names, which ComfyUI, A1111 and Forge load, and those of diffusers and PEFT.

kohya: `lora_unet_<layer in LDM's spelling, with _>.lora_down.weight`, `.lora_up.weight`, `.alpha`, and `.dora_scale` for DoRA.
diffusers: `unet.<layer>.lora_A.weight`, `.lora_B.weight`, `.lora_magnitude_vector`, and perhaps a note on alpha in the metadata.
Text encoders are `lora_te1_<layer, with _>` and `lora_te2_…` there, and `text_encoder.<layer>` and `text_encoder_2.<layer>` here.
Programs divide alpha by the rank, and take a missing one for a factor of 1. Whether a file fits is told by its header: no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aquatint.errors import ModelFileError
from aquatint.models.adapter_shapes import NAME, TARGETS, AdapterSpec, layer_shapes, spec_layers
from aquatint.models.sdxl import detect
from aquatint.models.sdxl.keys import PREFIXES, published_name, to_original
from aquatint.models.sdxl.shapes import TEXT_ENCODERS, Component, Shape
from aquatint.tensor_file import TensorFile

if TYPE_CHECKING:
    from torch import Tensor

Names = Literal["kohya", "diffusers"]
Places = Mapping[str, Mapping[str, str]]
"""Layer -> part (down, up, magnitude, alpha) -> name in the file."""

PEFT_KEY = "lora_adapter_metadata"  # where diffusers notes what PEFT's tensors do not say
_PARTS = {
    ".lora_down.weight": "down", ".lora_A.weight": "down", ".lora.down.weight": "down",
    ".lora_up.weight": "up", ".lora_B.weight": "up", ".lora.up.weight": "up",
    ".dora_scale": "magnitude", ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".alpha": "alpha",
}  # fmt: skip
_OTHER_KIND = "this program reads LoRA and DoRA of the UNet: choose such a file, or leave out `adapter.start_from`"
_DAMAGED = "the file is damaged: fetch it again"


@dataclass(frozen=True)
class Added:
    """What a file adds to one layer: `scale * up @ down`, and DoRA's magnitudes (outputs,). In the file's dtype."""

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None


def file_layer(names: Names, layer: str) -> str:
    """What a layer of the UNet is called in a file, or one of a text encoder."""
    network = _network(layer)
    name = published_name(network, layer.removeprefix(f"{network}."))
    if names == "diffusers":
        return f"{network}.{name}"
    if network == "unet":
        return "lora_unet_" + to_original("unet", layer).name.removeprefix(PREFIXES["unet"]).replace(".", "_")
    return f"lora_te{1 if network == 'text_encoder' else 2}_{name}".replace(".", "_")


def read_adapter(path: Path, unet: Mapping[str, Shape]) -> dict[str, Added]:
    """Layer -> what a file adds to it; `unet` has the shapes of all tensors of the model.

    Raises ModelFileError for what is no LoRA, is of another kind or model, or has more than these.
    """
    with _opened(path) as file:
        places, noted = find_places(file, unet), _noted_scales(file)
        return {layer: _read(file, layer, parts, noted[_network(layer)]) for layer, parts in places.items()}


def start_values(path: Path, unet: Mapping[str, Shape], spec: AdapterSpec) -> dict[str, Tensor]:
    """Name -> first value of everything that is trained, float32, each `up` multiplied by what the file's scale differs from the spec's.

    Raises ModelFileError as `check_adapter` does.
    """
    check_adapter(path, unet, spec)
    values = {}
    for layer, added in read_adapter(path, unet).items():
        values[f"{layer}.{NAME}.down"], values[f"{layer}.{NAME}.up"] = added.down.float(), added.up.float() * (added.scale / spec.scale)
        if added.magnitude is not None:
            values[f"{layer}.{NAME}.magnitude"] = added.magnitude.float()
    return values


def check_adapter(path: Path, unet: Mapping[str, Shape], spec: AdapterSpec) -> None:
    """Raises ModelFileError if a file does not hold exactly what the spec asks for, as far as its header tells."""
    with _opened(path) as file:
        places = find_places(file, unet)
        ranks = sorted({file.tensors[parts["down"]].shape[0] for parts in places.values()})
    _refuse_other_layers(path, places, unet, spec)
    if ranks != [spec.rank]:
        raise ModelFileError(
            f"{path} has rank {' and '.join(map(str, ranks))}, and `adapter.rank` is {spec.rank}",
            hint=f"set `adapter.rank = {ranks[0]}`" if len(ranks) == 1 else "choose a file with the same rank in all layers",
        )
    is_dora = {"magnitude" in parts for parts in places.values()}
    if is_dora != {spec.kind == "dora"}:
        kind = "dora" if is_dora == {True} else "lora"
        raise ModelFileError(f'{path} does not fit `adapter.kind = "{spec.kind}"`', hint=f'set `adapter.kind = "{kind}"`')


def find_places(file: TensorFile, unet: Mapping[str, Shape]) -> Places:
    """Where everything is, all of it there and in its shape. Raises ModelFileError."""
    layers = layer_shapes(unet)
    known = {file_layer(names, layer): layer for layer in layers for names in ("kohya", "diffusers")}  # type: ignore[arg-type]
    known |= {f"lora_unet_{layer.replace('.', '_')}": layer for layer in layers}  # as OneTrainer and others write kohya's names
    unheard = _unheard(layers)
    places: dict[str, dict[str, str]] = {}
    for name in file.tensors:
        stem, part = next(((name.removesuffix(end), part) for end, part in _PARTS.items() if name.endswith(end)), (name, None))
        if stem.startswith(unheard):
            continue
        if name.startswith(("lora_te", "text_encoder")) and stem not in known:
            raise ModelFileError(
                f"{file.path} changes the text encoders too (`{name}`), which are not trained here",
                hint="set `text_encoders.train` to those that it changes, or choose a LoRA of the UNet alone",
            )
        if part is None:
            raise ModelFileError(f"{file.path} holds `{name}`, which is no part of a LoRA", hint=_OTHER_KIND)
        if stem not in known:
            raise ModelFileError(f"{file.path} is for another model: SDXL has no layer `{stem}`", hint=_OTHER_KIND)
        places.setdefault(known[stem], {})[part] = name
    if not places:
        raise ModelFileError(f"{file.path} is empty", hint=_OTHER_KIND)
    for layer, parts in places.items():
        _check_shapes(file, layer, parts, layers[layer])
    return places


def _unheard(layers: Mapping[str, Shape]) -> tuple[str, ...]:
    """How the names of CLIP-L's last layer begin in a file: other programs train it, and no UNet is told anything by it."""
    heard = {layer.split(".")[3] for layer in layers if layer.startswith("text_encoder.encoder.")}
    last = f"text_encoder.encoder.layers.{len(heard)}"
    return (file_layer("kohya", last) + "_", file_layer("diffusers", last) + ".") if heard else ()


def _opened(path: Path) -> TensorFile:
    if not path.is_file():
        raise ModelFileError(
            f"there is no file {path}", hint="check the spelling of `adapter.start_from`; relative paths start at the config file"
        )
    detect.refuse_container(path)
    return TensorFile(path)


def _check_shapes(file: TensorFile, layer: str, parts: Mapping[str, str], weight: Shape) -> None:
    missing = [part for part in ("down", "up") if part not in parts]
    if missing:
        raise ModelFileError(f"{file.path} lacks the `{missing[0]}` matrix of `{layer}`", hint=_DAMAGED)
    shapes = {part: file.tensors[name].shape for part, name in parts.items()}
    (outputs, *rest), ones, rank = weight, (1,) * len(weight[2:]), next(iter(shapes["down"]), 0)
    if not rank or shapes["down"] != (rank, *rest) or shapes["up"] != (outputs, rank, *ones):
        raise ModelFileError(
            f"{file.path} does not fit `{layer}`: {list(shapes['down'])} and {list(shapes['up'])}, for a weight of {list(weight)}",
            hint="it is for another model: " + _OTHER_KIND,
        )
    if shapes.get("magnitude", (outputs,)) not in ((outputs,), (outputs, 1, *ones), (1, outputs, 1, 1)):
        raise ModelFileError(
            f"{file.path} has DoRA's magnitudes as {list(shapes['magnitude'])} for `{layer}`, which has {outputs} outputs",
            hint="DoRA is read with one magnitude for each output, as its paper has it, and not for each input: " + _OTHER_KIND,
        )
    if shapes.get("alpha", ()) not in ((), (1,)):
        raise ModelFileError(f"{file.path} has several alphas for `{layer}`", hint=_DAMAGED)


def _read(file: TensorFile, layer: str, parts: Mapping[str, str], noted: float) -> Added:
    tensors = {part: file.read(name) for part, name in parts.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ModelFileError(f"{file.path} has values in `{layer}` that are not finite numbers", hint=_DAMAGED)
    scale = tensors["alpha"].item() / len(tensors["down"]) if "alpha" in tensors else noted
    magnitude = tensors["magnitude"].flatten() if "magnitude" in tensors else None
    return Added(tensors["down"], tensors["up"], scale, magnitude)


def _network(layer: str) -> Component:
    """The network that a layer is of."""
    return next((one for one in TEXT_ENCODERS if layer.startswith(f"{one}.")), "unet")


def _noted_scales(file: TensorFile) -> dict[Component, float]:
    """The scale of each network in a file without alphas: diffusers' note on it, or 1. Raises ModelFileError for one by layer."""
    networks: tuple[Component, ...] = ("unet", *TEXT_ENCODERS)
    return {network: _noted_scale(file, network) for network in networks}


def _noted_scale(file: TensorFile, network: Component) -> float:
    if PEFT_KEY not in file.metadata:
        return 1.0
    try:
        values = json.loads(file.metadata[PEFT_KEY]).items()
        noted = {key.removeprefix(f"{network}."): value for key, value in values if network == "unet" or key.startswith(f"{network}.")}
        rank, alpha = float(noted.get("r", 1)), float(noted.get("lora_alpha", noted.get("r", 1)))
        scale = float(alpha / (rank**0.5 if noted.get("use_rslora") else rank))
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise ModelFileError(f"{file.path} says in `{PEFT_KEY}` what cannot be understood: {error}", hint=_OTHER_KIND) from error
    if noted.get("alpha_pattern") or noted.get("rank_pattern"):
        raise ModelFileError(f"{file.path} has ranks or alphas that differ from layer to layer", hint=_OTHER_KIND)
    return scale


def _refuse_other_layers(path: Path, places: Places, unet: Mapping[str, Shape], spec: AdapterSpec) -> None:
    wanted = spec_layers(unet, spec)
    if places.keys() == wanted.keys():
        return
    fitting = [targets for targets in TARGETS if spec_layers(unet, replace(spec, targets=targets)).keys() == places.keys()]
    different = sorted(places.keys() ^ wanted.keys())
    hint = f'set `adapter.targets = "{fitting[0]}"`' if fitting else "no choice of `adapter.targets` has just those: choose another file"
    trained, there = set(map(_network, wanted)), set(map(_network, places))
    if "unet" in there < trained:
        names = ", ".join(f'"{one}"' for one in TEXT_ENCODERS if one in there)
        hint = f"it does not change every text encoder that is trained: set `text_encoders.train = [{names}]`, or choose another file"
    raise ModelFileError(
        f"{path} has {len(places)} layers, and `adapter.targets` asks for {len(wanted)}: `{different[0]}` is only in one of them",
        hint=hint,
    )
