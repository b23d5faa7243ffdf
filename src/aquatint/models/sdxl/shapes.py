"""Names and shapes of every tensor, worked out from the configs alone: no torch, no weights.

Names are those of the modules' own state dicts (diffusers, transformers); the configs are theirs too. Planning counts
parameters with this, and a file is checked against it before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

Shape = tuple[int, ...]
Entry = tuple[str, Shape]
T = TypeVar("T")
Component = Literal["unet", "vae", "text_encoder", "text_encoder_2"]
TextEncoder = Literal["text_encoder", "text_encoder_2"]
COMPONENTS: tuple[Component, ...] = ("unet", "vae", "text_encoder", "text_encoder_2")
TEXT_ENCODERS: tuple[TextEncoder, ...] = ("text_encoder", "text_encoder_2")
# In every official file and used by nothing: carried from the base to the export, byte for byte.
CARRIED: dict[Component, str] = {"text_encoder": "embeddings.position_ids", "text_encoder_2": "logit_scale"}


def component_shapes(component: Component, config: dict[str, Any]) -> dict[str, Shape]:
    """Internal tensor name -> shape. The text encoders include the one tensor each that no module uses (`CARRIED`)."""
    if component == "unet":
        return dict(_unet(config))
    if component == "vae":
        return dict(_vae(config))
    if component == "text_encoder":
        return {**dict(_text_model(config)), CARRIED[component]: (1, config["max_position_embeddings"])}
    shapes = {f"text_model.{name}": shape for name, shape in _text_model(config)}
    shapes["text_projection.weight"] = (config["projection_dim"], config["hidden_size"])
    return {**shapes, CARRIED[component]: ()}


def heard_shapes(component: TextEncoder, config: dict[str, Any]) -> dict[str, Shape]:
    """The tensors of a text encoder that the UNet is told anything by.

    It reads the state before CLIP-L's last layer, and so nothing of that layer and of the norm after it. Of bigG it is told that
    state and what comes out at the end.
    """
    unheard: tuple[str, ...] = (CARRIED[component],)
    if component == "text_encoder":
        unheard = (*unheard, f"encoder.layers.{config['num_hidden_layers'] - 1}.", "final_layer_norm.")
    return {name: shape for name, shape in component_shapes(component, config).items() if not name.startswith(unheard)}


def qualified(component: Component, name: str) -> str:
    """What a tensor is called among all that a run can train: a text encoder stands before its own, and the UNet's are as they are."""
    return name if component == "unet" else f"{component}.{name}"


def is_text(name: str) -> bool:
    """Whether a tensor that is called so is one of a text encoder."""
    return name.startswith(TEXT_ENCODERS)


def by_component(tensors: Mapping[str, T]) -> dict[Component, dict[str, T]]:
    """The same tensors by network and internal name; `unet` is always there."""
    found: dict[Component, dict[str, T]] = {"unet": {}}
    for name, tensor in tensors.items():
        encoder = next((one for one in TEXT_ENCODERS if name.startswith(f"{one}.")), None)
        found.setdefault(encoder or "unet", {})[name if encoder is None else name.removeprefix(f"{encoder}.")] = tensor
    return found


def _linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> Iterator[Entry]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _conv(name: str, inputs: int, outputs: int, kernel: int) -> Iterator[Entry]:
    yield f"{name}.weight", (outputs, inputs, kernel, kernel)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, channels: int) -> Iterator[Entry]:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)


def _resnet(name: str, inputs: int, outputs: int, time_channels: int | None) -> Iterator[Entry]:
    yield from _norm(f"{name}.norm1", inputs)
    yield from _conv(f"{name}.conv1", inputs, outputs, 3)
    if time_channels is not None:
        yield from _linear(f"{name}.time_emb_proj", time_channels, outputs)
    yield from _norm(f"{name}.norm2", outputs)
    yield from _conv(f"{name}.conv2", outputs, outputs, 3)
    if inputs != outputs:
        yield from _conv(f"{name}.conv_shortcut", inputs, outputs, 1)


def _attention(name: str, channels: int, context: int, *, bias: bool) -> Iterator[Entry]:
    yield from _linear(f"{name}.to_q", channels, channels, bias=bias)
    yield from _linear(f"{name}.to_k", context, channels, bias=bias)
    yield from _linear(f"{name}.to_v", context, channels, bias=bias)
    yield from _linear(f"{name}.to_out.0", channels, channels)


def _transformer(name: str, channels: int, context: int, num_layers: int) -> Iterator[Entry]:
    yield from _norm(f"{name}.norm", channels)
    yield from _linear(f"{name}.proj_in", channels, channels)
    for layer in range(num_layers):
        block = f"{name}.transformer_blocks.{layer}"
        yield from _norm(f"{block}.norm1", channels)
        yield from _attention(f"{block}.attn1", channels, channels, bias=False)
        yield from _norm(f"{block}.norm2", channels)
        yield from _attention(f"{block}.attn2", channels, context, bias=False)
        yield from _norm(f"{block}.norm3", channels)
        yield from _linear(f"{block}.ff.net.0.proj", channels, 8 * channels)  # 4 x for the values, 4 x for GEGLU's gate
        yield from _linear(f"{block}.ff.net.2", 4 * channels, channels)
    yield from _linear(f"{name}.proj_out", channels, channels)


def _unet(config: dict[str, Any]) -> Iterator[Entry]:
    channels: list[int] = list(config["block_out_channels"])
    depths: list[int] = list(config["transformer_layers_per_block"])
    context, num_layers = config["cross_attention_dim"], config["layers_per_block"]
    time_channels, last = 4 * channels[0], len(channels) - 1
    yield from _conv("conv_in", config["in_channels"], channels[0], 3)
    yield from _linear("time_embedding.linear_1", channels[0], time_channels)
    yield from _linear("time_embedding.linear_2", time_channels, time_channels)
    yield from _linear("add_embedding.linear_1", config["projection_class_embeddings_input_dim"], time_channels)
    yield from _linear("add_embedding.linear_2", time_channels, time_channels)
    skips, inputs = [channels[0]], channels[0]
    for i, (kind, outputs) in enumerate(zip(config["down_block_types"], channels, strict=True)):
        for j in range(num_layers):
            yield from _resnet(f"down_blocks.{i}.resnets.{j}", inputs, outputs, time_channels)
            if kind == "CrossAttnDownBlock2D":
                yield from _transformer(f"down_blocks.{i}.attentions.{j}", outputs, context, depths[i])
            inputs = outputs
            skips.append(outputs)
        if i != last:
            yield from _conv(f"down_blocks.{i}.downsamplers.0.conv", outputs, outputs, 3)
            skips.append(outputs)
    yield from _resnet("mid_block.resnets.0", inputs, inputs, time_channels)
    yield from _transformer("mid_block.attentions.0", inputs, context, depths[-1])
    yield from _resnet("mid_block.resnets.1", inputs, inputs, time_channels)
    for i, (kind, outputs) in enumerate(zip(config["up_block_types"], reversed(channels), strict=True)):
        for j in range(num_layers + 1):
            yield from _resnet(f"up_blocks.{i}.resnets.{j}", inputs + skips.pop(), outputs, time_channels)
            if kind == "CrossAttnUpBlock2D":
                yield from _transformer(f"up_blocks.{i}.attentions.{j}", outputs, context, depths[last - i])
            inputs = outputs
        if i != last:
            yield from _conv(f"up_blocks.{i}.upsamplers.0.conv", outputs, outputs, 3)
    yield from _norm("conv_norm_out", channels[0])
    yield from _conv("conv_out", channels[0], config["out_channels"], 3)


def _vae(config: dict[str, Any]) -> Iterator[Entry]:
    channels: list[int] = list(config["block_out_channels"])
    latent, num_layers = config["latent_channels"], config["layers_per_block"]
    yield from _conv("encoder.conv_in", config["in_channels"], channels[0], 3)
    inputs = channels[0]
    for i, outputs in enumerate(channels):
        for j in range(num_layers):
            yield from _resnet(f"encoder.down_blocks.{i}.resnets.{j}", inputs if j == 0 else outputs, outputs, None)
        if i != len(channels) - 1:
            yield from _conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", outputs, outputs, 3)
        inputs = outputs
    yield from _vae_middle("encoder", inputs)
    yield from _conv("encoder.conv_out", inputs, 2 * latent, 3)
    yield from _conv("quant_conv", 2 * latent, 2 * latent, 1)
    yield from _conv("post_quant_conv", latent, latent, 1)
    yield from _conv("decoder.conv_in", latent, inputs, 3)
    yield from _vae_middle("decoder", inputs)
    for i, outputs in enumerate(reversed(channels)):
        for j in range(num_layers + 1):
            yield from _resnet(f"decoder.up_blocks.{i}.resnets.{j}", inputs if j == 0 else outputs, outputs, None)
        if i != len(channels) - 1:
            yield from _conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", outputs, outputs, 3)
        inputs = outputs
    yield from _norm("decoder.conv_norm_out", inputs)
    yield from _conv("decoder.conv_out", inputs, config["out_channels"], 3)


def _vae_middle(side: str, channels: int) -> Iterator[Entry]:
    yield from _resnet(f"{side}.mid_block.resnets.0", channels, channels, None)
    yield from _norm(f"{side}.mid_block.attentions.0.group_norm", channels)
    yield from _attention(f"{side}.mid_block.attentions.0", channels, channels, bias=True)
    yield from _resnet(f"{side}.mid_block.resnets.1", channels, channels, None)
    if side == "encoder":
        yield from _norm("encoder.conv_norm_out", channels)


def _text_model(config: dict[str, Any]) -> Iterator[Entry]:
    width = config["hidden_size"]
    yield "embeddings.token_embedding.weight", (config["vocab_size"], width)
    yield "embeddings.position_embedding.weight", (config["max_position_embeddings"], width)
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{projection}", width, width)
        yield from _norm(f"{layer}.layer_norm1", width)
        yield from _linear(f"{layer}.mlp.fc1", width, config["intermediate_size"])
        yield from _linear(f"{layer}.mlp.fc2", config["intermediate_size"], width)
        yield from _norm(f"{layer}.layer_norm2", width)
    yield from _norm("final_layer_norm", width)
