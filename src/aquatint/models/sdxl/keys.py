"""Names of the official single-file layout and of the modules, both ways.

The official layout is the one of SDXL 1.0's own file (2,515 tensors), which ComfyUI, A1111 and Forge read: LDM names for
the UNet and the autoencoder, transformers' names for CLIP-L, OpenCLIP's names for bigG. Internal names are those of the
modules' state dicts. Three kinds of tensor differ by more than their name: bigG's query, key and value are one tensor,
its text projection is transposed, and the autoencoder's attention is written as 1x1 convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from aquatint.models.sdxl.model import ModelSpec, sdxl_spec
from aquatint.models.sdxl.shapes import COMPONENTS, Component, Shape

PREFIXES: dict[Component, str] = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.text_model.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
FUSED = ("q_proj", "k_proj", "v_proj")  # the order in which OpenCLIP stacks them


@dataclass(frozen=True)
class Origin:
    """Where an internal tensor lies in the official layout, and in which form."""

    name: str
    part: int | None = None  # which third of a fused tensor: an index into FUSED
    transposed: bool = False
    as_conv: bool = False  # a matrix that is written as the kernel of a 1x1 convolution


@dataclass(frozen=True)
class Piece:
    """One internal tensor of which an official one is made."""

    component: Component
    name: str
    origin: Origin


def to_original(component: Component, name: str) -> Origin:
    """The place of an internal tensor in the official layout. Raises KeyError for a name that SDXL does not have."""
    prefix = PREFIXES[component]
    if component == "unet":
        return Origin(prefix + _rename(name, _unet_modules()))
    if component == "vae":
        return Origin(prefix + _rename(name, _vae_modules()), as_conv=is_vae_matrix(name))
    if component == "text_encoder":
        return Origin(prefix + name)
    return _bigg_origin(prefix, name)


def published_name(component: Component, name: str) -> str:
    """What a diffusers folder calls an internal tensor.

    CLIP-L's names begin with `text_model.` in every published folder; transformers leaves it out since 5.6 and reads both.
    """
    return f"text_model.{name}" if component == "text_encoder" else name


def is_vae_matrix(name: str) -> bool:
    """Whether an internal tensor of the autoencoder is one of its attention's matrices."""
    return ".attentions." in name and name.endswith(".weight") and "group_norm" not in name


def from_original(component: Component, name: str) -> tuple[str, ...]:
    """The internal tensors of an official one: one, or three for a fused one. Raises KeyError for an unknown name."""
    if not name.startswith(PREFIXES[component]):
        raise KeyError(name)
    name = name.removeprefix(PREFIXES[component])
    if component == "unet":
        return (_rename(name, _inverse(_unet_modules())),)
    if component == "vae":
        return (_rename(name, _inverse(_vae_modules())),)
    if component == "text_encoder":
        return (name,)
    return _bigg_internal(name)


def original_layout(spec: ModelSpec) -> dict[str, tuple[Piece, ...]]:
    """Every official tensor of a model of this size, and what it is made of (parts in order)."""
    layout: dict[str, list[Piece]] = {}
    for component in COMPONENTS:
        for name in spec.shapes(component):
            origin = to_original(component, name)
            layout.setdefault(origin.name, []).append(Piece(component, name, origin))
    return {name: tuple(sorted(pieces, key=lambda piece: piece.origin.part or 0)) for name, pieces in layout.items()}


def stored_shape(origin: Origin, shape: Shape) -> Shape:
    """The shape in the official layout of a tensor of which `shape` is the internal one."""
    if origin.part is not None:
        return (len(FUSED) * shape[0], *shape[1:])
    if origin.transposed:
        return shape[::-1]
    return (*shape, 1, 1) if origin.as_conv else shape


def original_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Official name -> shape, for a model of this size."""
    internal = {component: spec.shapes(component) for component in COMPONENTS}
    firsts = {name: pieces[0] for name, pieces in original_layout(spec).items()}
    return {name: stored_shape(piece.origin, internal[piece.component][piece.name]) for name, piece in firsts.items()}


def official_shapes() -> dict[str, Shape]:
    """Official name -> shape of all 2,515 tensors of SDXL 1.0."""
    return original_shapes(sdxl_spec())


def _rename(name: str, modules: Mapping[str, str]) -> str:
    """Replaces the longest known module path at the beginning of a tensor's name."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (module := modules.get(".".join(parts[:length]))) is not None:
            return ".".join([module, *parts[length:]])
    raise KeyError(name)


def _inverse(modules: Mapping[str, str]) -> dict[str, str]:
    return {original: internal for internal, original in modules.items()}


@cache
def _unet_modules() -> Mapping[str, str]:
    return dict(_unet_pairs())


@cache
def _vae_modules() -> Mapping[str, str]:
    return dict(_vae_pairs())


def _unet_pairs() -> Iterator[tuple[str, str]]:
    yield from {
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.attentions.0": "middle_block.1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op", "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv", "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    }.items()  # fmt: skip
    yield from _unet_resnet_pairs("mid_block.resnets.0", "middle_block.0")
    yield from _unet_resnet_pairs("mid_block.resnets.1", "middle_block.2")
    for i in range(3):
        for j in range(2):
            yield from _unet_resnet_pairs(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{3 * i + j + 1}.0")
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{3 * i + j + 1}.1"
        for j in range(3):
            yield from _unet_resnet_pairs(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{3 * i + j}.0")
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{3 * i + j}.1"


def _unet_resnet_pairs(internal: str, original: str) -> Iterator[tuple[str, str]]:
    for name, layer in {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }.items():  # fmt: skip
        yield f"{internal}.{name}", f"{original}.{layer}"


def _vae_pairs() -> Iterator[tuple[str, str]]:
    yield from {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}.items()
    for side in ("encoder", "decoder"):
        yield f"{side}.conv_in", f"{side}.conv_in"
        yield f"{side}.conv_norm_out", f"{side}.norm_out"
        yield f"{side}.conv_out", f"{side}.conv_out"
        yield from _vae_resnet_pairs(f"{side}.mid_block.resnets.0", f"{side}.mid.block_1")
        yield from _vae_resnet_pairs(f"{side}.mid_block.resnets.1", f"{side}.mid.block_2")
        for name, layer in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
            yield f"{side}.mid_block.attentions.0.{name}", f"{side}.mid.attn_1.{layer}"
    for i in range(4):
        yield f"encoder.down_blocks.{i}.downsamplers.0.conv", f"encoder.down.{i}.downsample.conv"
        yield f"decoder.up_blocks.{i}.upsamplers.0.conv", f"decoder.up.{3 - i}.upsample.conv"  # LDM counts from the picture
        for j in range(3):
            yield from _vae_resnet_pairs(f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}")
            yield from _vae_resnet_pairs(f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{3 - i}.block.{j}")


def _vae_resnet_pairs(internal: str, original: str) -> Iterator[tuple[str, str]]:
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield f"{internal}.{name}", f"{original}.{name}"
    yield f"{internal}.conv_shortcut", f"{original}.nin_shortcut"


_BIGG = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
    "logit_scale": "logit_scale",
}
_BIGG_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def _bigg_origin(prefix: str, name: str) -> Origin:
    if name in _BIGG:
        return Origin(prefix + _BIGG[name], transposed=name == "text_projection.weight")
    match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        raise KeyError(name)
    block, rest = f"{prefix}transformer.resblocks.{match[1]}", match[2]
    fused = re.fullmatch(r"self_attn\.([qkv]_proj)\.(weight|bias)", rest)
    if fused is not None:
        return Origin(f"{block}.attn.in_proj_{fused[2]}", part=FUSED.index(fused[1]))
    return Origin(f"{block}.{_rename(rest, _BIGG_LAYER)}")


def _bigg_internal(name: str) -> tuple[str, ...]:
    inverse = _inverse(_BIGG)
    if name in inverse:
        return (inverse[name],)
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if match is None:
        raise KeyError(name)
    layer, rest = f"text_model.encoder.layers.{match[1]}", match[2]
    fused = re.fullmatch(r"attn\.in_proj_(weight|bias)", rest)
    if fused is not None:
        return tuple(f"{layer}.self_attn.{part}.{fused[1]}" for part in FUSED)
    return (f"{layer}.{_rename(rest, _inverse(_BIGG_LAYER))}",)
