"""How many operations, readings by the host and allocations does a step take, ours and that of diffusers' script?

    python -m benchmarks.step_counts

runs both loops under a dispatch mode that counts each aten call, twice. With the tiny UNet on the CPU each has the AdamW that it really
has. With the full topology on the meta device, batches come from the CPU as they come to a GPU, so that copies between the two are
seen, and clips and the script's AdamW have the foreach form that torch chooses on a GPU. (The tiny UNet cannot tell a reading of the
CPU's own numbers from one of a GPU's: AdamW as a loop reads every tensor's step count.) Ours is counted with the settings of [speed] too:
each of their operations is one call here, and one to four kernels on a GPU.
Counted of each step after the first: aten calls, those of them that make no new tensor and write none (views), the tensors that foreach
and fused calls work on, new tensors and their bytes; and what makes the host wait for a GPU: scalars and lists read from the device, and
copies to or from it that are not asynchronous. An aten call is not a kernel: foreach calls launch several, and attention on the meta device
is spelt out in matrix products. Goals: 0 waits, and 40 % fewer aten calls.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aquatint.demo.model import tiny_spec
from aquatint.models.sdxl.model import build_unet, sdxl_spec
from aquatint.optim.create import create_optimizer
from aquatint.training.parallelize import Speed, rearrange
from benchmarks.machine import has, keep, load, versions
from benchmarks.ours import Loop, draw_batches, our_loop, our_parts, our_unet, repeated, tiny_unet
from benchmarks.peers import script, script_loop, script_loop_accelerate

WARMUP, STEPS, BATCH_SIZE = 1, 2, 2
TOTALS = ("aten calls", "views", "tensors in foreach and fused calls", "new tensors", "megabytes of new tensors")
WAITS = ("scalars read", "lists read", "copies that wait")
READS = {"tolist", "numpy", "__array__"}
aten = torch.ops.aten


class Tally(TorchDispatchMode):
    """Counts what is dispatched, by the phase of the step. Readings of the meta device, which has no answers, give ones."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.counts: Counter[str] = Counter()
        self.phases: Counter[str] = Counter()
        self.phase = "before the UNet"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.counts["aten calls"] += 1
        self.phases[self.phase] += 1
        self.counts["views"] += func.is_view
        if "foreach" in func.__name__ or "fused" in func.__name__:
            self.counts["tensors in foreach and fused calls"] += len(args[0])
        if func is aten._local_scalar_dense.default:
            self.counts["scalars read"] += args[0].device.type == self.device.type
            if args[0].is_meta:
                return torch.ones((), dtype=args[0].dtype).item()
        self.counts["copies that wait"] += waits(func, args, kwargs)
        if func is aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in tensors}
        fresh = {}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known:
                fresh[leaf.untyped_storage()._cdata] = leaf.untyped_storage().nbytes()
        self.counts["new tensors"] += len(fresh)
        self.counts["bytes"] += sum(fresh.values())
        return result


def waits(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a copy goes from one device to another and the host stands still for it."""
    if func is aten._to_copy.default:
        target = kwargs.get("device")
        return target is not None and torch.device(target).type != args[0].device.type and not kwargs.get("non_blocking", False)
    if func is aten.copy_.default:
        return args[0].device.type != args[1].device.type and not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    return False


class Lists(TorchFunctionMode):
    """Counts tensors that are read as a whole without a dispatched call. Those of the CPU count only if all is on the CPU."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS and isinstance(args[0], Tensor) and args[0].device.type == self.tally.device.type:
            self.tally.counts["lists read"] += 1
            if args[0].is_meta:
                args = (torch.ones(args[0].shape, dtype=args[0].dtype), *args[1:])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def phases(tally: Tally, unet: Any, optimizer: Any) -> Iterator[None]:
    """Tells the tally where a step is."""

    def begin(phase: str) -> Callable[..., None]:
        return lambda *_: setattr(tally, "phase", phase)

    hooks = [
        unet.register_forward_pre_hook(begin("UNet forward")),
        unet.register_forward_hook(begin("loss, backward, clip")),
        optimizer.register_step_pre_hook(begin("optimizer")),
        optimizer.register_step_post_hook(begin("after the optimizer")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def as_on_a_gpu(device: torch.device) -> Iterator[None]:
    """Lets the meta device pass for a GPU: clips take their foreach form, and autocast, which is off here anyway, does not refuse it."""
    if device.type != "meta":
        yield
        return
    with (
        mock.patch("torch.nn.utils.clip_grad._has_foreach_support", return_value=True),
        mock.patch("torch.nn.utils.clip_grad._device_has_foreach_support", return_value=True),
        mock.patch("torch.autocast", return_value=contextlib.nullcontext()),
        mock.patch("torch.is_autocast_enabled", return_value=False),
    ):
        yield


def count(loop: Loop, unet: Any, optimizer: Any, side_latent: int, steps: int = STEPS) -> dict[str, Any]:
    """Per step, of steps that are not the first."""
    device = next(unet.parameters()).device
    batches = repeated(draw_batches(dict(unet.config), 2, BATCH_SIZE, side_latent))
    tally = Tally(device)
    with phases(tally, unet, optimizer), tally, Lists(tally), as_on_a_gpu(device):
        loop(batches, WARMUP)
        tally.counts.clear()
        tally.phases.clear()
        loop(batches, steps)
    counts = {name: value / steps for name, value in tally.counts.items()}
    counts["megabytes of new tensors"] = counts["bytes"] / 1e6
    joined = tally.phases["before the UNet"] + tally.phases["after the optimizer"]  # the end of one step is the beginning of the next
    by_phase = {"UNet forward": tally.phases["UNet forward"], "loss, backward, clip": tally.phases["loss, backward, clip"]}
    by_phase |= {"optimizer": tally.phases["optimizer"], "all else": joined}
    return {
        **{name: round(counts.get(name, 0.0), 1) for name in (*TOTALS, *WAITS)},
        "aten calls by phase": {phase: value / steps for phase, value in by_phase.items()},
    }


def tiny() -> dict[str, Any]:
    """On the CPU, each with its own AdamW."""
    found = {}
    for name in ["ours", "script", *(["script with accelerate"] if has("accelerate") else [])]:
        unet = our_unet() if name == "ours" else tiny_unet()
        if name == "ours":
            optimizer: Any = create_optimizer("adamw", unet.named_parameters(), seed=0, learning_rate=1e-5, weight_decay=0.01)
            loop = our_loop(our_parts(unet, optimizer))
        else:
            optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5)
            loop = (script_loop if name == "script" else script_loop_accelerate)(script(unet, optimizer))
        found[name] = count(loop, unet, optimizer, tiny_spec().unet["sample_size"])
    return found


def full(side_latent: int = 128) -> dict[str, Any]:
    """On the meta device, at 1024 px."""
    found = {}
    for name in ("ours", "ours, [speed]", "script"):
        unet: Any = build_unet(sdxl_spec()).train()
        if name.startswith("ours"):
            speed = Speed() if name == "ours" else Speed(channels_last=True, kernels=True, fused_qkv=True)
            rearrange(unet, speed, torch.device("meta"), lean=True)
            optimizer: Any = create_optimizer("adamw", unet.named_parameters(), seed=0, learning_rate=1e-5, weight_decay=0.01)
            loop = our_loop(our_parts(unet, optimizer, device="meta"))
        else:
            optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, foreach=True)
            loop = script_loop(script(unet, optimizer, device="meta"))
        found[name] = count(loop, unet, optimizer, side_latent)
    return found


def verdict(found: dict[str, Any]) -> dict[str, float]:
    ours, theirs = found["ours"], found["script"]
    return {
        "times the host waits, ours": sum(ours[name] for name in WAITS),
        "times the host waits, script": sum(theirs[name] for name in WAITS),
        "aten calls, ours / script": round(ours["aten calls"] / theirs["aten calls"], 3),
        "aten calls, ours with [speed] / script": round(found["ours, [speed]"]["aten calls"] / theirs["aten calls"], 3),
        "new tensors, ours / script": round(ours["new tensors"] / theirs["new tensors"], 3),
    }


def main() -> None:
    torch.set_num_threads(1)
    found = {"tiny, CPU": tiny(), "full, meta": full()}
    result = {
        "versions": versions(), "load": load(), "batch_size": BATCH_SIZE, "per_step": found,
        "verdict": verdict(found["full, meta"]), "goals": {"times the host waits, ours": 0, "aten calls, ours / script": 0.6},
    }  # fmt: skip
    keep("step_counts_cpu", result)


if __name__ == "__main__":
    main()
