"""What does a picture leave for the backward pass, and what does it cost to compute it again: nothing, what is pointwise, whole blocks?

    python benchmarks/recompute.py [--rounds 5]

counts what the SDXL UNet keeps of pictures of 1024 × 1024 pixels on tensors without memory, with PyTorch's own selective checkpointing
beside ours, and times blocks of it on one core by processor time, in turns: as ratios to the plain pass, and the milliseconds that a block
of almost no arithmetic takes, which is what Python and the dispatcher take for themselves. Beside that, whether all gradients have the
same bits. A GPU has other ratios: there the arithmetic is quick, and what is pointwise waits for memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from aquatint.models.recompute import ATTENTION, ROWS, keeping_products
from aquatint.models.sdxl.model import sdxl_spec
from aquatint.planning.trace import trace_step
from benchmarks.machine import keep, load, spread, versions

GIB = 1 << 30
SIDE_PX = 1024
Way = Callable[..., Any]


def selective(block: torch.nn.Module, *args: Any) -> Any:
    """PyTorch's selective checkpointing with the same operations."""

    def policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_kept = operation in ROWS or operation in ATTENTION
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


WAYS: dict[str, Way] = {
    "plain": lambda block, *args: block(*args),
    "pointwise": partial(keeping_products, shortest_row=1),
    "torch's selective": selective,
    "whole blocks": partial(checkpoint, use_reentrant=False),
}


def blocks(smallest_only: bool) -> dict[str, tuple[torch.nn.Module, tuple[Any, ...], int]]:
    """Blocks with inputs, and how often a round goes through: of almost no arithmetic, and as the UNet has them at 256 to 512 pixels."""
    found: dict[str, tuple[torch.nn.Module, tuple[Any, ...], int]] = {}
    for width, tokens, passes in ((32, 16, 20), (640, 1024, 1))[: 1 if smallest_only else 2]:
        block = BasicTransformerBlock(width, max(1, width // 64), min(64, width), cross_attention_dim=2 * width, attention_bias=False)
        hidden, text = torch.randn(1, tokens, width, requires_grad=True), torch.randn(1, 77, 2 * width)
        found[f"transformer block, {tokens} × {width}"] = block, (hidden, None, text), passes
    for width, side, passes in ((32, 4, 20), (320, 64, 1))[: 1 if smallest_only else 2]:
        block = ResnetBlock2D(in_channels=width, out_channels=width, temb_channels=4 * width)
        hidden, step = torch.randn(1, width, side, side, requires_grad=True), torch.randn(1, 4 * width)
        found[f"residual block, {side} × {side} × {width}"] = block, (hidden, step), passes
    return found


def times(block: torch.nn.Module, args: tuple[Any, ...], rounds: int, passes: int) -> dict[str, Any]:
    """Seconds of processor time for forward and backward of each way, in turns, and whether its gradients have the plain ones' bits."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    gradients: dict[str, list[torch.Tensor]] = {}
    for turn in range(rounds + 1):
        for name, way in WAYS.items():
            block.zero_grad()
            began = time.process_time()
            for _ in range(passes):
                way(block, *args).square().mean().backward()
            if turn:
                seconds[name].append((time.process_time() - began) / passes)
            gradients[name] = [weight.grad for weight in block.parameters() if weight.grad is not None]
            block.zero_grad()
    return {
        name: {
            "milliseconds": spread([1000 * value for value in found], 2),
            "ratio": spread([value / plain for value, plain in zip(found, seconds["plain"], strict=True)], 3),
            "same bits": all(map(torch.equal, gradients[name], gradients["plain"])),
        }
        for name, found in seconds.items()
    }


def kept(sizes: Sequence[int] = (1, 2)) -> dict[str, Any]:
    """GiB that the first picture leaves, and each further one, and TFLOP of a step."""
    found = {}
    for name, settings in {
        "bf16": {"dtype": torch.bfloat16, "autocast": False},
        "float32 weights, bf16 math": {"dtype": torch.float32, "autocast": True},
    }.items():
        for what in (False, "pointwise", True):
            common: dict[str, Any] = {**settings, "checkpointing": what, "size_hw": (SIDE_PX, SIDE_PX)}
            one, two = (trace_step(sdxl_spec(), **common, batch_size=size) for size in sizes)
            found[f"{name}, {'nothing' if what is False else 'whole blocks' if what is True else what}"] = {
                "first_gib": round(one.activations / GIB, 3), "each_further_gib": round((two.activations - one.activations) / GIB, 3),
                "step_tflop": round(one.flops / 1e12, 2),
            }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    timed = {name: times(block.train(), args, rounds, passes) for name, (block, args, passes) in blocks(smallest_only=False).items()}
    keep("recompute_cpu", {"versions": versions(), "load": load(), "rounds": rounds, "kept": kept(), "blocks": timed})


if __name__ == "__main__":
    main()
