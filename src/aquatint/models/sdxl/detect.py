"""What a file that is not a whole SDXL model is instead, in words that say what to do. Looks at names and shapes only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aquatint.errors import ModelFileError
from aquatint.models.sdxl.keys import PREFIXES
from aquatint.storage import storage_errors
from aquatint.tensor_file import TensorInfo

Tensors = Mapping[str, TensorInfo]

USE_SDXL = "choose SDXL 1.0 base or a model made from it, as one .safetensors file or as a diffusers folder"
_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
_CONV_IN = f"{PREFIXES['unet']}input_blocks.0.0.weight"


@dataclass(frozen=True)
class Kind:
    """A kind of file that people mix up with a base model."""

    matches: Callable[[Tensors], bool]
    what: str
    hint: str


def refuse_container(path: Path) -> None:
    """Raises ModelFileError for what is not a safetensors file at all: pickles, GGUF, Git LFS pointers, web pages."""
    with storage_errors("read", path), path.open("rb") as file:
        start = file.read(64)
    is_pickle = path.suffix.lower() in _PICKLES
    if start[8:9] == b"{" and not is_pickle:
        return  # the header of a safetensors file; the eight bytes before it are its length, and may look like anything
    if is_pickle or start[:2] == b"PK" or start[:1] == b"\x80":
        raise ModelFileError(
            f"{path} is a pickle file, which can run any program when it is opened",
            hint="download the .safetensors version of the model, or convert it with a tool that you trust",
        )
    if start[:4] == b"GGUF":
        raise ModelFileError(f"{path} is a GGUF file, whose weights are rounded too coarsely to train", hint=USE_SDXL)
    if start.startswith(b"version https://git-lfs"):
        raise ModelFileError(
            f"{path} is a pointer of Git LFS, not the model itself", hint="run `git lfs pull` in its folder, or download the file itself"
        )
    if start.lstrip()[:1] == b"<":
        raise ModelFileError(
            f"{path} is a web page, not a model", hint="the download needed a login or the link was wrong: download the model again"
        )


def refuse_other_models(path: Path, tensors: Tensors, *, need_vae: bool) -> None:
    """Raises ModelFileError when the tensors are those of something else than a whole SDXL model."""
    for kind in _KINDS:
        if kind.matches(tensors):
            raise ModelFileError(f"{path} is {kind.what}", hint=kind.hint)
    has_text = all(_starts(PREFIXES[component])(tensors) for component in ("text_encoder", "text_encoder_2"))
    if not has_text:
        raise ModelFileError(
            f"{path} has no text encoders", hint="choose the full checkpoint, which has the UNet, both text encoders and the VAE"
        )
    if need_vae and not _starts(PREFIXES["vae"])(tensors):
        raise ModelFileError(f"{path} has no VAE", hint="set `model.vae` to the SDXL VAE, or choose a checkpoint that includes it")


def refuse_other_pipelines(folder: Path, index: Mapping[str, Any]) -> None:
    """Raises ModelFileError when a folder's model_index.json names another kind of model."""
    pipeline = str(index.get("_class_name"))
    if "Inpaint" in pipeline:
        raise ModelFileError(f"{folder} holds an inpainting model ({pipeline})", hint=_INPAINTING_HINT)
    if not pipeline.startswith("StableDiffusionXL"):
        raise ModelFileError(f"{folder} holds another kind of model ({pipeline})", hint=USE_SDXL)
    encoder: Any = index.get("text_encoder")
    if not encoder or encoder[0] is None:
        raise ModelFileError(f"{folder} holds the SDXL refiner, which has only one text encoder", hint=_REFINER_HINT)


def refuse_other_unet_config(folder: Path, unet: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises ModelFileError when the UNet's config in a diffusers folder does not describe SDXL's, which is `expected`."""
    if unet.get("in_channels", 4) != expected["in_channels"]:
        raise ModelFileError(
            f"{folder} holds an inpainting or editing model: its UNet reads {unet['in_channels']} channels", hint=_INPAINTING_HINT
        )
    blocks = ("down_block_types", "mid_block_type", "up_block_types", "layers_per_block", "addition_embed_type")
    depths = unet.get("transformer_layers_per_block")
    same_depths = isinstance(depths, list) and len(depths) == 3 and all(isinstance(depth, int) for depth in depths)
    if not same_depths or any(unet.get(key, expected[key]) != expected[key] for key in blocks):
        raise ModelFileError(f"{folder} holds a UNet that is built differently from SDXL's", hint=USE_SDXL)


def _starts(prefix: str) -> Callable[[Tensors], bool]:
    return lambda tensors: any(name.startswith(prefix) for name in tensors)


def _contains(*parts: str) -> Callable[[Tensors], bool]:
    return lambda tensors: any(part in name for name in tensors for part in parts)


def _has(*names: str) -> Callable[[Tensors], bool]:
    return lambda tensors: any(name in tensors for name in names)


def _is_vae_alone(tensors: Tensors) -> bool:
    has_vae = "encoder.conv_in.weight" in tensors or _starts(PREFIXES["vae"])(tensors)
    return has_vae and not _starts(PREFIXES["unet"])(tensors) and not _starts("conditioner.")(tensors)


def _is_inpainting(tensors: Tensors) -> bool:
    return _CONV_IN in tensors and len(tensors[_CONV_IN].shape) == 4 and tensors[_CONV_IN].shape[1] != 4


def _is_unet_alone(tensors: Tensors) -> bool:
    has_unet = "conv_in.weight" in tensors or "input_blocks.0.0.weight" in tensors or _starts(PREFIXES["unet"])(tensors)
    return has_unet and not _starts("conditioner.")(tensors)


_INPAINTING_HINT = "choose the model's ordinary (text to image) version; inpainting versions cannot be trained"
_REFINER_HINT = "choose SDXL 1.0 base; the refiner cannot be trained"
_KINDS = (
    Kind(
        _contains("lora_down", "lora_up", "lora_A.", "lora_B.", "lora.down.", "lora.up.", "hada_w1", "lokr_w1", "oft_blocks"),
        "a LoRA, a small addition to a model and not a model",
        "choose the full checkpoint that the LoRA was made for",
    ),
    Kind(
        _contains("control_model.", "input_hint_block.", "controlnet_"),
        "a ControlNet, an addition to a model and not a model",
        USE_SDXL,
    ),
    Kind(_has("emb_params", "clip_l", "clip_g"), "a textual inversion embedding, not a model", USE_SDXL),
    Kind(
        _contains("scale_weight", "scaled_fp8", ".weight_scale", ".comfy_quant", ".absmax", ".qweight"),
        "a compressed model whose weights are not stored as they are",
        "choose the fp16, bf16 or fp32 version of the model",
    ),
    Kind(_starts("conditioner.embedders.0.model."), "the SDXL refiner", _REFINER_HINT),
    Kind(_starts("cond_stage_model.transformer."), "a Stable Diffusion 1 model", USE_SDXL),
    Kind(_starts("cond_stage_model.model."), "a Stable Diffusion 2 model", USE_SDXL),
    Kind(_contains("double_blocks.", "joint_blocks."), "a model of another family (FLUX, SD3 or the like)", USE_SDXL),
    Kind(_is_inpainting, "an inpainting or editing model: its UNet reads more than the 4 channels of a picture", _INPAINTING_HINT),
    Kind(_is_vae_alone, "a VAE alone", "set `model.base` to the full checkpoint; this file can go into `model.vae`"),
    Kind(
        _is_unet_alone,
        "a UNet alone, without text encoders",
        "choose the full checkpoint, which has the UNet, both text encoders and the VAE",
    ),
    Kind(lambda tensors: not _starts(PREFIXES["unet"])(tensors), "not a model that this program knows: it has no SDXL UNet", USE_SDXL),
)
