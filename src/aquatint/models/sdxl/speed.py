"""A UNet of diffusers that computes the same in fewer passes over memory: its modules, weights and names stay as they are.

Modules get another class, whose `forward` is ours; what hangs on them, such as adapters and checkpointing, goes on as before.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from aquatint.models.kernels.geglu import geglu, geglu_linear
from aquatint.models.kernels.group_norm import group_norm
from aquatint.models.kernels.joined import joined_linear

Backend = Literal["inductor", "aot_eager", "eager"]
BLOCKS = (BasicTransformerBlock, ResnetBlock2D)


class PlainResnet(ResnetBlock2D):
    """A residual block without the division by 1 that diffusers ends it with."""

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:  # type: ignore[override]
        hidden = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        hidden = hidden + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        hidden = self.conv2(self.dropout(self.nonlinearity(self.norm2(hidden))))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return input_tensor + hidden


class PlainAttention(Attention):
    """Attention without a division by 1, and without a look at the signature of a processor."""

    def project(self, hidden_states: Tensor, captions: Tensor | None) -> list[Tensor]:
        """Query, key and value; of the captions the last two, if there are any."""
        source = hidden_states if captions is None else captions
        return [self.to_q(hidden_states), self.to_k(source), self.to_v(source)]

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        assert attention_mask is None, "SDXL has no masks"
        found = self.project(hidden_states, encoder_hidden_states)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in found)
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        output: Tensor = self.to_out[1](self.to_out[0](seen))
        return output


class ChannelsLastTransformer(Transformer2DModel):
    """Hands on its tokens as pictures with channels last, which they are, where diffusers copies them."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        pictures: Tensor = self.proj_out(hidden_states).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return pictures + residual


class OwnGroupNorm(nn.GroupNorm):
    """GroupNorm by `kernels.group_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.weight, self.bias, self.num_groups, self.eps)


class OwnGroupNormSilu(nn.GroupNorm):
    """GroupNorm and the SiLU after it by `kernels.group_norm`; a `shift` (B, C) comes before."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return group_norm(x, self.weight, self.bias, self.num_groups, self.eps, shift=shift, silu=True)


class OwnResnet(ResnetBlock2D):
    """A residual block whose norms do the adding of the time embedding and the SiLU as well."""

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:  # type: ignore[override]
        hidden = self.conv1(self.norm1(input_tensor))
        shift = self.time_emb_proj(self.nonlinearity(temb))
        hidden = self.conv2(self.dropout(self.norm2(hidden, shift)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return input_tensor + hidden


class OwnFeedForward(FeedForward):
    """GEGLU by `kernels.geglu`."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        first, _, last = self.net
        result: Tensor = last(geglu(first.proj(hidden_states)))
        return result


class LeanFeedForward(OwnFeedForward):
    """Keeps the projection alone for the backward pass; with an adapter on its second layer the gated product too, which that needs."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        first, _, last = self.net
        if not is_plain(last):
            return super().forward(hidden_states)
        return geglu_linear(first.proj(hidden_states), last.weight, last.bias)


class JoinedAttention(PlainAttention):
    """One product for query, key and value, or for key and value where those come from the captions."""

    def project(self, hidden_states: Tensor, captions: Tensor | None) -> list[Tensor]:
        if captions is None:
            return joined_linear(hidden_states, self.to_q.weight, self.to_k.weight, self.to_v.weight)
        return [self.to_q(hidden_states), *joined_linear(captions, self.to_k.weight, self.to_v.weight)]


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is its matrix and nothing else: no adapter hangs on it, and its weights are not quantised."""
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks


def leave_out_idle(unet: nn.Module) -> None:
    """Leaves out what changes no bit: divisions by 1, and what diffusers looks up at every step for models that are not SDXL."""
    for module in unet.modules():
        if type(module) is ResnetBlock2D and is_sdxl_resnet(module):
            module.__class__ = PlainResnet
        elif type(module) is Attention and is_sdxl_attention(module):
            module.__class__ = PlainAttention


def is_sdxl_resnet(block: Any) -> bool:
    plain = block.upsample is None and block.downsample is None and block.time_embedding_norm == "default" and not block.skip_time_act
    return plain and block.time_emb_proj is not None and isinstance(block.nonlinearity, nn.SiLU) and block.output_scale_factor == 1


def is_sdxl_attention(attention: Any) -> bool:
    names = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "residual_connection")
    return all(not getattr(attention, name) for name in names) and attention.rescale_output_factor == 1 and attention.scale_qk


def use_channels_last(unet: nn.Module) -> None:
    """Pictures go through the UNet with their channels last.

    Trained weights stay as they are in memory, and so do the optimizer's state, averages and files: a convolution turns them as it
    needs them. Frozen weights are turned once.
    """
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(_turn)
            if not module.weight.requires_grad:
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        elif isinstance(module, Transformer2DModel):
            if not module.use_linear_projection:
                raise ValueError("a transformer with convolutions around it is not of SDXL")
            module.__class__ = ChannelsLastTransformer


def _turn(conv: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])


def use_kernels(unet: nn.Module, *, lean: bool = True) -> None:
    """Norms of pictures with what is around them, and GEGLU, by `models.kernels`. Raises ValueError for parts that SDXL does not have.

    `lean`: half of what GEGLU leaves for the backward pass is made there again. Checkpointing does that by itself, and would then
    have to make the product after it again as well.
    """
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            if not is_sdxl_resnet(module):
                raise ValueError("a residual block of another kind is not of SDXL")
            module.norm1.__class__ = module.norm2.__class__ = OwnGroupNormSilu
            module.__class__ = OwnResnet
        elif isinstance(module, Transformer2DModel):
            module.norm.__class__ = OwnGroupNorm
        elif isinstance(module, FeedForward):
            if not isinstance(module.net[0], GEGLU) or len(module.net) != 3 or module.net[1].p > 0:
                raise ValueError("a feed-forward layer without GEGLU, or with dropout, is not of SDXL")
            module.__class__ = LeanFeedForward if lean else OwnFeedForward
    unet.conv_norm_out.__class__ = OwnGroupNormSilu  # type: ignore[assignment, union-attr]
    unet.conv_act = nn.Identity()


def use_fused_qkv(unet: Any) -> None:
    """One product for the projections of each attention. Raises ValueError where one of them is more than a matrix."""
    for module in unet.modules():
        if isinstance(module, Attention):
            for layer in (module.to_q, module.to_k, module.to_v):
                if not is_plain(layer) or layer.bias is not None:
                    raise ValueError("a projection with a bias, an adapter or another number format cannot be joined with others")
            module.__class__ = JoinedAttention


def can_compile_exactly() -> bool:
    """Whether torch can be told to choose the same arithmetic every time; older ones cannot."""
    import torch._inductor.config

    return hasattr(torch._inductor.config, "deterministic")


def compile_blocks(unet: nn.Module, num_shapes: int, backend: Backend = "inductor") -> None:
    """Every transformer and residual block is compiled when it first meets a shape, and once for all blocks of its kind.

    `num_shapes`: of pictures in the run. The same run compiles to the same arithmetic again, so that it can go on exactly.
    """
    blocks = [module for module in unet.modules() if isinstance(module, BLOCKS)]
    graphs = 2 * len(blocks) * (num_shapes + 1)  # at most: each block of a kind of its own, with gradients and without
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, graphs)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, graphs)
    options: dict[str, Any] = {"options": {"deterministic": True}} if backend == "inductor" else {}
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend, **options)
