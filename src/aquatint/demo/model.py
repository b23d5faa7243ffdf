"""The demo's base model: SDXL's topology at a thousandth of its size, in the official single-file layout.

Its UNet is untrained and its text encoders stay as they are drawn: fixed random networks whose states differ clearly from
word to word, which is all that a UNet needs to learn what the words mean in a small set of captions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from aquatint.diffusion.parameterization import Prediction
from aquatint.models.sdxl.export import Tensors, write_single_file
from aquatint.models.sdxl.load import LOGIT_SCALE
from aquatint.models.sdxl.model import ModelSpec, sdxl_spec
from aquatint.models.sdxl.shapes import CARRIED, COMPONENTS, Component, Shape
from aquatint.tensor_file import LazyTensor
from aquatint.utils.seeds import generator

# Standard deviation of a matrix, times the root of its number of inputs, by the end of its name; 1 where none fits.
_GAINS: dict[Component, dict[str, float]] = {
    "unet": {"weight": 3**-0.5},  # the deviation that torch's own layers begin with; with 1 the low noise levels are not learned
    "vae": {"conv2.weight": 0.3, "to_out.0.weight": 0.3},
    # attention is averaged over the words before a position, so what it adds must be strong to be seen
    "text_encoder": {"out_proj.weight": 2.0, "fc2.weight": 0.5},
    "text_encoder_2": {"out_proj.weight": 2.0, "fc2.weight": 0.5},
}
_EMBEDDING_DEVIATIONS = {"token_embedding.weight": 1.0, "position_embedding.weight": 0.3}


def tiny_spec() -> ModelSpec:
    """The sizes of the demo's model. The two text encoders differ in width because diffusers tells them apart by it."""
    official = sdxl_spec()
    text = {"num_attention_heads": 2, "num_hidden_layers": 2}
    return ModelSpec(
        unet={
            **official.unet,
            "block_out_channels": [32, 64, 128],
            "attention_head_dim": [1, 2, 4],  # a number of heads, in spite of its name
            "transformer_layers_per_block": [1, 1, 2],
            "cross_attention_dim": 32 + 48,
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 48 + 6 * 32,
            "norm_num_groups": 8,
            "sample_size": 16,
        },
        vae={**official.vae, "block_out_channels": [24, 32, 48, 64], "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 128},
        text_encoder={**official.text_encoder, **text, "hidden_size": 32, "intermediate_size": 64, "projection_dim": 32},
        text_encoder_2={**official.text_encoder_2, **text, "hidden_size": 48, "intermediate_size": 96, "projection_dim": 48},
    )


def write_tiny_base(
    path: Path,
    *,
    seed: int,
    spec: ModelSpec | None = None,
    vae_tensors: Mapping[str, Tensor] | None = None,
    prediction: Prediction = "epsilon",
    zero_terminal_snr: bool = False,
) -> None:
    """Writes a base model with random weights (float32), the same for the same seed.

    `vae_tensors` (internal names) take the place of the random autoencoder, in their own dtype.
    """
    spec = spec or tiny_spec()
    components: dict[Component, Tensors] = {component: random_tensors(component, spec, seed) for component in COMPONENTS}
    if vae_tensors is not None:
        components["vae"] = vae_tensors
    metadata = {"modelspec.title": "aquatint demo", "modelspec.resolution": "128x128"}
    write_single_file(path, spec, components, prediction=prediction, zero_terminal_snr=zero_terminal_snr, metadata=metadata)


def random_tensors(component: Component, spec: ModelSpec, seed: int) -> dict[str, LazyTensor]:
    """Internal name -> fresh weights of one network, made when they are written."""
    shapes = spec.shapes(component)
    carried = CARRIED.get(component)
    tensors = {
        name: LazyTensor(torch.float32, shape, partial(_draw, component, name, shape, seed, position))
        for position, (name, shape) in enumerate(shapes.items())
        if name != carried
    }
    if carried == CARRIED["text_encoder"]:
        tensors[carried] = LazyTensor(torch.int64, shapes[carried], lambda: torch.arange(prod(shapes[carried])).reshape(shapes[carried]))
    elif carried is not None:
        tensors[carried] = LazyTensor(torch.float32, (), lambda: torch.tensor(LOGIT_SCALE))
    return tensors


def _draw(component: Component, name: str, shape: Shape, seed: int, position: int) -> Tensor:
    """Norms start as the identity, biases at 0, the rest normal with a deviation that keeps the scale of what goes through."""
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith(".weight") else torch.zeros(shape)
    gain = next((gain for end, gain in _GAINS[component].items() if name.endswith(end)), 1.0)
    deviation = next((value for end, value in _EMBEDDING_DEVIATIONS.items() if name.endswith(end)), gain / prod(shape[1:]) ** 0.5)
    values = generator(seed, f"tiny-base/{component}", position).standard_normal(prod(shape), dtype="float32")
    return torch.from_numpy(values).reshape(shape) * deviation
