"""Bytes that live at the same time in a forward and backward pass, and its arithmetic, counted on tensors without memory.

PyTorch's fake tensors know shape, dtype and storage and nothing else, so a pass of the full-size UNet takes a few
seconds and no memory. Every operation really runs through autograd, with the operators that a GPU would use (a fused
attention that keeps no score matrix), so what is alive when is what would be alive on a GPU. Kernels' own workspaces and
the allocator's leftovers are not seen. The same pass counts the floating-point operations, with the formulas of PyTorch's
flop counter; the counter itself keeps tensors alive, so it cannot be on while bytes are counted.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aquatint.models.sdxl.model import (
    ModelSpec,
    build_text_encoders,
    build_unet,
    build_vae,
    count_positions,
    decode_latents,
    predict,
)
from aquatint.models.sdxl.shapes import TEXT_ENCODERS, TextEncoder

if TYPE_CHECKING:
    import torch

    from aquatint.models.adapter_shapes import AdapterSpec
    from aquatint.models.frozen_shapes import Format
    from aquatint.models.recompute import Recompute

TOKENS = 77
PX_PER_LATENT = 8


@dataclass(frozen=True)
class StepCost:
    """Of one training pass. `activations` are the bytes that the forward pass leaves for the backward pass, `peak` the most
    that gradients and activations take together, weights not counted. `flops` are the floating-point operations, of them
    `forward_flops` until the loss. `updates` has, for each weight that is stepped inside the pass, the bytes at that moment and
    its elements."""

    activations: int
    peak: int
    forward_flops: int
    flops: int
    updates: tuple[tuple[int, int], ...] = ()

    def peak_with(self, update_bytes: int) -> int:
        """The peak if stepping a weight inside the pass takes so many bytes per element for a moment."""
        return max(self.peak, *(there + update_bytes * elements for there, elements in self.updates), 0)


@dataclass(frozen=True)
class PassCost:
    """Of a pass without gradients: the most bytes that it needs beside the weights, and its floating-point operations."""

    peak: int
    flops: int


class Tally:
    """The bytes of all storages that are alive, now and at most, and the floating-point operations so far."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        """`known` are not counted, such as the weights."""
        self.now = self.peak = self.flops = 0
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
        """Counts what every operation inside the block does and makes, also inside the backward pass."""
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        tally, formulas, which_device = self, flop_formulas(), torch.ops.prim.device.default

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is which_device:  # two calls of three ask a fake tensor for its device: the short way
                    return args[0].fake_device
                result = func(*args, **(kwargs or {}))
                for value in result if isinstance(result, tuple | list) else (result,):
                    if isinstance(value, torch.Tensor):
                        tally.add(value)
                if formula := formulas.get(func.overloadpacket):
                    tally.flops += formula(*args, **(kwargs or {}), out_val=result)
                return result

        with Count():
            yield


def flop_formulas() -> Mapping[Any, Callable[..., int]]:
    """Floating-point operations by operator: two for each multiply-add of matrix products, convolutions and attention.

    The rest of a network waits for memory, not for arithmetic, and counts nothing. The backward pass of attention is
    counted as twice the forward pass, as for every product; that a fused kernel computes the scores again is left out.
    """
    import torch
    from torch.utils.flop_counter import flop_registry

    def attention(query: torch.Tensor, key: Any, *_: Any, **__: Any) -> int:
        tokens: int = key.shape[-2]
        return 4 * query.numel() * tokens  # query × key, scores × value; heads and width are in numel

    def attention_backward(_: Any, query: torch.Tensor, key: Any, *__: Any, **___: Any) -> int:
        return 2 * attention(query, key)

    aten = torch.ops.aten
    return {
        **flop_registry,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }


def trace_step(
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    autocast: bool,
    checkpointing: Recompute,
    batch_size: int,
    size_hw: tuple[int, int],
    accumulating: bool = False,
    fused_backward: bool = False,
    num_tokens: int = TOKENS,
    adapter: AdapterSpec | None = None,
    adapter_dtype: torch.dtype | None = None,
    frozen: Collection[str] = (),
    halved: Collection[str] = (),
    compact: tuple[Sequence[str], Format] = ((), "own"),
    texts: Collection[TextEncoder] = (),
    kernels: bool = False,
    on_gpu: bool = True,
) -> StepCost:
    """One training pass of the UNet on pictures of `size_hw` pixels; with `adapter`, of that beside the frozen UNet.

    `frozen` names weights that are not trained. With `texts`, which are trained, a caption for each picture is encoded in the pass.
    `halved`: weights in bf16, whatever the others are. `compact`: layers whose weights are made when they are needed, and of what.
    `accumulating`: the gradients of an earlier pass are there already. `fused_backward`: each is freed as soon as it is complete.
    `kernels`: norms and GEGLU are our own. `on_gpu`: autocast computes other norms in float32.
    """
    import torch

    from aquatint.models.frozen import freeze_compactly, halve
    from aquatint.models.recompute import recompute

    unet: Any = build_unet(spec)  # outside of the mode, in which it takes seven times as long
    encoders = build_text_encoders(spec) if texts else ()
    with _fake():
        _join(unet, encoders, texts, dtype)
        with_fake_weights(unet, dtype).train()
        recompute(unet, checkpointing)
        freeze_compactly(unet, *compact, dtype)
        halve(unet, halved)
        if adapter is not None:
            _adapt(unet, adapter, adapter_dtype or dtype, norms_in_float32=autocast and on_gpu)
        for name in frozen:
            unet.get_parameter(name).requires_grad_(False)
        if kernels:
            _use_kernels(unet, lean=not checkpointing)
        weights = [weight for weight in unet.parameters() if weight.requires_grad]
        tally = Tally(weight for module in (unet, *encoders) for weight in (*module.parameters(), *module.buffers()))
        inputs = _unet_inputs(spec, batch_size, size_hw, num_tokens)
        ids = torch.zeros(batch_size * num_tokens // TOKENS, TOKENS, dtype=torch.int64)
        with tally.counting(), _norms_in_float32(unet, autocast and on_gpu):
            for weight in weights if accumulating else ():
                weight.grad = torch.zeros_like(weight)
            gradients = tally.now
            updates = free_gradients(weights, tally) if fused_backward else []
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = predict(unet, *(_told(inputs, encoders, ids, num_tokens) if encoders else inputs))
            activations, forward_flops = tally.now - gradients, tally.flops
            output.square().mean().backward()
        return StepCost(activations, tally.peak, forward_flops, tally.flops, tuple(updates))


def _use_kernels(unet: Any, *, lean: bool) -> None:
    from aquatint.models.sdxl.speed import use_channels_last, use_kernels

    use_channels_last(unet)
    use_kernels(unet, lean=lean)


def _join(unet: Any, encoders: Sequence[Any], trained: Collection[TextEncoder], dtype: torch.dtype) -> None:
    """The text encoders as training has them: what is trained is a part of the UNet."""
    from aquatint.models.sdxl.conditioning import take_off_unheard

    if not encoders:
        return
    take_off_unheard(encoders[0])
    count_positions(*encoders)
    for name, encoder in zip(TEXT_ENCODERS, encoders, strict=True):
        if name in trained:
            unet.add_module(name, encoder)
        else:
            with_fake_weights(encoder, dtype).requires_grad_(False)


def _told(inputs: Sequence[torch.Tensor], encoders: Sequence[Any], ids: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, ...]:
    """The inputs with embeddings of these ids (N, 77)."""
    from aquatint.models.sdxl.conditioning import encode_ids

    latents, timesteps, _, _, time_ids = inputs
    hidden, pooled = encode_ids(*encoders, ids, ids)
    return latents, timesteps, hidden.reshape(len(latents), num_tokens, -1), pooled[:: num_tokens // TOKENS], time_ids


def _adapt(unet: Any, adapter: AdapterSpec, dtype: torch.dtype, *, norms_in_float32: bool) -> None:
    """The adapters that training would attach. Norms become float32 if autocast is to compute them so."""
    import torch

    from aquatint.models.adapters import attach

    attach(unet, adapter, dtype)
    for norm in unet.modules():
        if norms_in_float32 and isinstance(norm, torch.nn.GroupNorm | torch.nn.LayerNorm):
            with_fake_weights(norm, torch.float32).requires_grad_(False)


def free_gradients(weights: Iterable[torch.Tensor], tally: Tally) -> list[tuple[int, int]]:
    """Frees the gradient of each weight once the backward pass is through with it. The list grows by the bytes then, and its elements."""
    found: list[tuple[int, int]] = []

    def free(weight: torch.Tensor) -> None:
        found.append((tally.now, weight.numel()))
        weight.grad = None

    for weight in weights:
        weight.register_post_accumulate_grad_hook(free)
    return found


def trace_unet(spec: ModelSpec, *, dtype: torch.dtype, batch_size: int, size_hw: tuple[int, int]) -> PassCost:
    """One forward pass of the UNet."""
    unet: Any = build_unet(spec)
    with _fake():
        with_fake_weights(unet, dtype)
        inputs = _unet_inputs(spec, batch_size, size_hw, TOKENS)
        return _without_gradients(unet, lambda: predict(unet, *inputs))


def trace_encode(spec: ModelSpec, *, dtype: torch.dtype, batch_size: int, size_hw: tuple[int, int]) -> PassCost:
    """Encoding a batch of pictures."""
    import torch

    vae: Any = build_vae(spec)
    with _fake():
        with_fake_weights(vae, dtype)
        pictures = torch.empty(batch_size, 3, *size_hw)
        return _without_gradients(vae, lambda: vae.encode(pictures.to(dtype)).latent_dist.parameters)


def trace_decode(spec: ModelSpec, *, dtype: torch.dtype, size_hw: tuple[int, int]) -> PassCost:
    """Decoding one picture."""
    import torch

    vae: Any = build_vae(spec)
    with _fake():
        with_fake_weights(vae, dtype)
        latents = torch.empty(1, spec.unet["in_channels"], size_hw[0] // PX_PER_LATENT, size_hw[1] // PX_PER_LATENT)
        return _without_gradients(vae, lambda: decode_latents(vae, latents))


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


def _without_gradients(module: Any, work: Callable[[], Any]) -> PassCost:
    import torch

    tally = Tally(module.parameters())
    with torch.no_grad(), tally.counting():
        work()
    return PassCost(tally.peak, tally.flops)


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

    norms = [part for part in module.modules() if type(part) in (torch.nn.GroupNorm, torch.nn.LayerNorm)]  # and not our own
    hooks = [norm.register_forward_pre_hook(lambda _, args: (args[0].float(),)) for norm in norms if enabled]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
