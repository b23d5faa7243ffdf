"""Bytes that live at the same time in a forward and backward pass, counted on tensors without memory.

PyTorch's fake tensors know shape, dtype and storage and nothing else, so a pass of the full-size UNet takes a second or
two and no memory. Every operation really runs through autograd, with the operators that a GPU would use (a fused
attention that keeps no score matrix), so what is alive when is what would be alive on a GPU. Kernels' own workspaces and
the allocator's leftovers are not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aquatint.models.sdxl.model import ModelSpec, build_unet, build_vae, decode_latents, predict

if TYPE_CHECKING:
    import torch

TOKENS = 77
PX_PER_LATENT = 8


@dataclass(frozen=True)
class StepBytes:
    """Of one training pass. `activations` is what the forward pass leaves for the backward pass, `peak` the most that
    gradients and activations take together, weights not counted."""

    activations: int
    peak: int


class LiveBytes:
    """The bytes of all storages that are alive, now and at most."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        """`known` are not counted, such as the weights."""
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what every operation inside the block makes, also inside the backward pass."""
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        live = self

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                for value in tree_leaves(result):
                    if hasattr(value, "untyped_storage"):
                        live.add(value)
                return result

        with Count():
            yield


def trace_step(
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    autocast: bool,
    checkpointing: bool,
    batch_size: int,
    size_hw: tuple[int, int],
    accumulating: bool = False,
    num_tokens: int = TOKENS,
) -> StepBytes:
    """One training pass of the UNet on pictures of `size_hw` pixels.

    `accumulating`: the gradients of an earlier pass are there already.
    """
    import torch

    with _fake():
        unet = with_fake_weights(build_unet(spec), dtype).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        weights = list(unet.parameters())
        live = LiveBytes(weights)
        inputs = _unet_inputs(spec, batch_size, size_hw, num_tokens)
        with live.counting(), _norms_in_float32(unet, autocast):
            if accumulating:
                for weight in weights:
                    weight.grad = torch.zeros_like(weight)
            gradients = live.now
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = predict(unet, *inputs)
            activations = live.now - gradients
            output.square().mean().backward()
        return StepBytes(activations, live.peak)


def trace_unet(spec: ModelSpec, *, dtype: torch.dtype, batch_size: int, size_hw: tuple[int, int]) -> int:
    """The most bytes that a forward pass without gradients needs beside the weights."""
    with _fake():
        unet = with_fake_weights(build_unet(spec), dtype)
        inputs = _unet_inputs(spec, batch_size, size_hw, TOKENS)
        return _peak(unet, lambda: predict(unet, *inputs))


def trace_encode(spec: ModelSpec, *, dtype: torch.dtype, batch_size: int, size_hw: tuple[int, int]) -> int:
    """The most bytes that encoding a batch of pictures needs beside the autoencoder's weights."""
    import torch

    with _fake():
        vae = with_fake_weights(build_vae(spec), dtype)
        pictures = torch.empty(batch_size, 3, *size_hw)
        return _peak(vae, lambda: vae.encode(pictures.to(dtype)).latent_dist.parameters)


def trace_decode(spec: ModelSpec, *, dtype: torch.dtype, size_hw: tuple[int, int]) -> int:
    """The most bytes that decoding one picture needs beside the autoencoder's weights."""
    import torch

    with _fake():
        vae = with_fake_weights(build_vae(spec), dtype)
        latents = torch.empty(1, spec.unet["in_channels"], size_hw[0] // PX_PER_LATENT, size_hw[1] // PX_PER_LATENT)
        return _peak(vae, lambda: decode_latents(vae, latents))


def with_fake_weights(module: Any, dtype: torch.dtype) -> Any:
    """The module with new weights of the same shapes, made in the mode that is on."""
    import torch

    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            setattr(part, name, torch.nn.Parameter(torch.empty(weight.shape, dtype=dtype)))
    return module


def _fake() -> contextlib.AbstractContextManager[Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def _peak(module: Any, work: Callable[[], Any]) -> int:
    import torch

    live = LiveBytes(module.parameters())
    with torch.no_grad(), live.counting():
        work()
    return live.peak


def _unet_inputs(spec: ModelSpec, batch_size: int, size_hw: tuple[int, int], num_tokens: int) -> tuple[torch.Tensor, ...]:
    """latents, timesteps, prompt_embeds, pooled_prompt_embeds, time_ids."""
    import torch

    height, width = size_hw
    return (
        torch.empty(batch_size, spec.unet["in_channels"], height // PX_PER_LATENT, width // PX_PER_LATENT),
        torch.zeros(batch_size, dtype=torch.int64),
        torch.empty(batch_size, num_tokens, spec.unet["cross_attention_dim"]),
        torch.empty(batch_size, spec.text_encoder_2["projection_dim"]),
        torch.empty(batch_size, 6),
    )


@contextlib.contextmanager
def _norms_in_float32(module: Any, enabled: bool) -> Iterator[None]:
    """Norms as CUDA's autocast runs them: in float32. The CPU's, which this trace goes through, leaves them in bf16."""
    import torch

    norms = [part for part in module.modules() if isinstance(part, torch.nn.GroupNorm | torch.nn.LayerNorm)]
    hooks = [norm.register_forward_pre_hook(lambda _, args: (args[0].float(),)) for norm in norms if enabled]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
