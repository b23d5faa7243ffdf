"""Small encoders for tests, as files: CLIP and DINOv2 of transformers with random weights, and the Inception network of FID."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from aquatint.models.sdxl.tokenizer import EOS
from aquatint.tensor_file import write_tensors

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDE_PX = 28


def write_clip(folder: Path) -> Path:
    """A CLIP with 16 dimensions that sees 28 x 28 pixels."""
    text = {"vocab_size": EOS + 1, "max_position_embeddings": 77, "intermediate_size": 64, "eos_token_id": EOS, **SMALL}
    vision = {"image_size": SIDE_PX, "patch_size": 14, "intermediate_size": 64, **SMALL}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    size = {"height": SIDE_PX, "width": SIDE_PX}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE_PX}, crop_size=size).save_pretrained(folder)
    return folder


def write_dinov2(folder: Path) -> Path:
    """A DINOv2 with 32 dimensions that sees the middle 28 x 28 pixels of 32."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        Dinov2Model(Dinov2Config(image_size=SIDE_PX, patch_size=14, **SMALL)).save_pretrained(folder)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    size = {"height": SIDE_PX, "width": SIDE_PX}
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=size, image_mean=mean, image_std=std).save_pretrained(folder)
    return folder


def inception_shapes() -> dict[str, tuple[int, int, int, int]]:
    """The filters of all 94 layers: out, in, height, width."""
    stem = [("1a_3x3", 3, 32, 3), ("2a_3x3", 32, 32, 3), ("2b_3x3", 32, 64, 3), ("3b_1x1", 64, 80, 1), ("4a_3x3", 80, 192, 3)]
    shapes = {f"Conv2d_{name}": (outs, ins, side, side) for name, ins, outs, side in stem}

    def block(name: str, **branches: tuple[int, int, str]) -> None:
        for branch, (ins, outs, filters) in branches.items():
            height, width = map(int, filters.split("x"))
            shapes[f"Mixed_{name}.branch{branch}"] = (outs, ins, height, width)

    for name, ins, pool in ("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64):
        block(name, **{
            "1x1": (ins, 64, "1x1"), "5x5_1": (ins, 48, "1x1"), "5x5_2": (48, 64, "5x5"), "3x3dbl_1": (ins, 64, "1x1"),
            "3x3dbl_2": (64, 96, "3x3"), "3x3dbl_3": (96, 96, "3x3"), "_pool": (ins, pool, "1x1"),
        })  # fmt: skip
    block("6a", **{"3x3": (288, 384, "3x3"), "3x3dbl_1": (288, 64, "1x1"), "3x3dbl_2": (64, 96, "3x3"), "3x3dbl_3": (96, 96, "3x3")})
    for name, inner in ("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192):
        block(name, **{
            "1x1": (768, 192, "1x1"), "7x7_1": (768, inner, "1x1"), "7x7_2": (inner, inner, "1x7"), "7x7_3": (inner, 192, "7x1"),
            "7x7dbl_1": (768, inner, "1x1"), "7x7dbl_2": (inner, inner, "7x1"), "7x7dbl_3": (inner, inner, "1x7"),
            "7x7dbl_4": (inner, inner, "7x1"), "7x7dbl_5": (inner, 192, "1x7"), "_pool": (768, 192, "1x1"),
        })  # fmt: skip
    block("7a", **{
        "3x3_1": (768, 192, "1x1"), "3x3_2": (192, 320, "3x3"), "7x7x3_1": (768, 192, "1x1"), "7x7x3_2": (192, 192, "1x7"),
        "7x7x3_3": (192, 192, "7x1"), "7x7x3_4": (192, 192, "3x3"),
    })  # fmt: skip
    for name, ins in ("7b", 1280), ("7c", 2048):
        block(name, **{
            "1x1": (ins, 320, "1x1"), "3x3_1": (ins, 384, "1x1"), "3x3_2a": (384, 384, "1x3"), "3x3_2b": (384, 384, "3x1"),
            "3x3dbl_1": (ins, 448, "1x1"), "3x3dbl_2": (448, 384, "3x3"), "3x3dbl_3a": (384, 384, "1x3"),
            "3x3dbl_3b": (384, 384, "3x1"), "_pool": (ins, 192, "1x1"),
        })  # fmt: skip
    return shapes


def inception_tensors(*, slimmer: int = 16) -> dict[str, torch.Tensor]:
    """The tensors of a file, random; every width divided by `slimmer`, which 16 divides without rest."""
    rng = np.random.Generator(np.random.Philox(key=7))

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    tensors = {}
    for layer, (outs, ins, height, width) in inception_shapes().items():
        outs, ins = outs // slimmer, 3 if ins == 3 else ins // slimmer
        tensors[f"{layer}.conv.weight"] = draw(outs, ins, height, width) * (2 / (ins * height * width)) ** 0.5
        tensors[f"{layer}.bn.weight"] = 1 + 0.2 * draw(outs)
        tensors[f"{layer}.bn.bias"] = 0.1 * draw(outs)
        tensors[f"{layer}.bn.running_mean"] = 0.1 * draw(outs)
        tensors[f"{layer}.bn.running_var"] = 0.5 + draw(outs).abs()
    return tensors | {"fc.weight": torch.zeros(1008, 2048 // slimmer), "fc.bias": torch.zeros(1008)}


def write_inception(path: Path, *, slimmer: int = 16) -> Path:
    """An Inception network with 2048 / `slimmer` features."""
    write_tensors(path, inception_tensors(slimmer=slimmer))
    return path
