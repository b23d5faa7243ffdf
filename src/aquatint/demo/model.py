"""The demo's base model: SDXL's topology at a thousandth of its size, in the official single-file layout.

Its UNet is untrained and its text encoders stay as they are drawn: fixed random networks whose states differ clearly from
word to word, which is all that a UNet needs to learn what the words mean in a small set of captions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from aquatint.models.sdxl.export import Tensors, write_single_file
from aquatint.models.sdxl.load import LOGIT_SCALE, open_base
from aquatint.models.sdxl.model import ModelSpec, sdxl_spec
from aquatint.models.sdxl.process import Process
from aquatint.models.sdxl.shapes import CARRIED, COMPONENTS, Component, Shape
from aquatint.tensor_file import LazyTensor
from aquatint.utils.seeds import generator

EPSILON = Process()
FINAL_BIAS = "text_model.final_layer_norm.bias"
LOUDNESS = 4.0  # of the text embeddings: an untrained UNet hears them over the noise within hundreds of steps, not thousands
_TEXT_GAINS = {
    "q_proj.weight": 0.3, "k_proj.weight": 0.3,  # even attention: every word counts about the same in the pooled embedding
    "out_proj.weight": 2.0 * LOUDNESS,  # what is averaged over the words must be strong to be seen
    "fc2.weight": 0.5 * LOUDNESS,
}  # fmt: skip
# Standard deviation of a matrix, times the root of its number of inputs, by the end of its name; 1 where none fits.
_GAINS: dict[Component, dict[str, float]] = {
    # 3**-0.5 is what torch's own layers begin with. The noise comes in softly and what is asked for loudly: otherwise colours
    # are learned, but not places, in which a word must meet the little that a convolution knows of where it is.
    "unet": {"conv_in.weight": 0.3 * 3**-0.5, "time_emb_proj.weight": 4 * 3**-0.5, "weight": 3**-0.5},
    "vae": {"conv2.weight": 0.3, "to_out.0.weight": 0.3},
    "text_encoder": _TEXT_GAINS,
    "text_encoder_2": {**_TEXT_GAINS, "text_projection.weight": LOUDNESS},
}
_BIAS_DEVIATIONS = {"conv_in.bias": 1.0, "conv1.bias": 0.3, "conv2.bias": 0.3}  # of the UNet; what is not named starts at 0
_EMBEDDING_DEVIATIONS = {"token_embedding.weight": 1.0 * LOUDNESS, "position_embedding.weight": 0.3 * LOUDNESS}


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
    process: Process = EPSILON,
    captions: Sequence[str] = (),
) -> None:
    """Writes a base model with random weights (float32), the same for the same seed.

    `vae_tensors` (internal names) take the place of the random autoencoder, in their own dtype. With `captions`, the mean
    of their pooled embeddings is 0: what all of them have in common is far larger than what tells them apart, and an
    untrained UNet then learns nothing from it for thousands of steps.
    """
    spec = spec or tiny_spec()
    components: dict[Component, Tensors] = {component: random_tensors(component, spec, seed) for component in COMPONENTS}
    if vae_tensors is not None:
        components["vae"] = vae_tensors
    metadata = {"modelspec.title": "aquatint demo", "modelspec.resolution": "128x128"}
    write_single_file(path, spec, components, process=process, metadata=metadata)
    if captions:
        bias = {FINAL_BIAS: -mean_final_state(path, captions)}
        components["text_encoder_2"] = {**components["text_encoder_2"], **bias}
        write_single_file(path, spec, components, process=process, metadata=metadata)


def mean_final_state(path: Path, captions: Sequence[str]) -> Tensor:
    """The mean over captions of what bigG's text projection is given, (width,) float32."""
    encoder = open_base(path).caption_encoder("cpu")
    states: list[Tensor] = []
    hook = encoder.bigg.text_projection.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    encoder.encode(captions)
    hook.remove()
    return torch.cat(states).mean(dim=0)


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
    """Norms start as the identity, most biases at 0, the rest normal with a deviation that keeps the scale of what goes through."""
    if len(shape) == 1 and name.endswith(".weight"):
        return torch.ones(shape)
    if len(shape) == 1:
        deviation = next((value for end, value in _BIAS_DEVIATIONS.items() if component == "unet" and name.endswith(end)), 0.0)
        return _normal(component, shape, seed, position) * deviation
    gain = next((gain for end, gain in _GAINS[component].items() if name.endswith(end)), 1.0)
    deviation = next((value for end, value in _EMBEDDING_DEVIATIONS.items() if name.endswith(end)), gain / prod(shape[1:]) ** 0.5)
    return _normal(component, shape, seed, position) * deviation


def _normal(component: Component, shape: Shape, seed: int, position: int) -> Tensor:
    values = generator(seed, f"tiny-base/{component}", position).standard_normal(prod(shape), dtype="float32")
    return torch.from_numpy(values).reshape(shape)
