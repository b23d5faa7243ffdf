"""Steps of sharded weights by two processes, compared with those of one; `differences` writes down where they part."""

import copy
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from aquatint.errors import UsageError
from aquatint.optim.clipping import Clipping, tensor_norms, whole_norm
from aquatint.optim.create import create_optimizer
from aquatint.optim.fused import FusedBackward

from .test_create import KINDS, SETTINGS

PROCESSES, STEPS, LEFT_OUT = 2, 5, 3
SHAPES = {
    "uneven, odd start": (5, 3),
    "uneven convolution": (5, 4, 3, 3),
    "blocks whole": (64, 96),
    "blocks cut": (6, 896),
    "nothing for the last": (1, 8),
    "vector": (7,),
    "long vector": (4608,),
    "number": (1,),
}
TOLERANCE = {"adafactor": 1e-6}  # its sums are added up in another order; all others are equal to the last bit


def weights(dtype: torch.dtype) -> nn.ParameterDict:
    bits = torch.Generator().manual_seed(0)
    return nn.ParameterDict({name: nn.Parameter(torch.randn(shape, generator=bits).to(dtype)) for name, shape in SHAPES.items()})


def shared(tensor: Tensor, mesh) -> DTensor:
    """By rows over the last dimension of a mesh, the same over the others."""
    return distribute_tensor(tensor.detach(), mesh, [*[Replicate()] * (mesh.ndim - 1), Shard(0)])


def steps(name: str, dtype: torch.dtype, mesh=None) -> nn.ParameterDict:
    """Weights after some clipped steps, one of which is left out."""
    module = weights(dtype)
    if mesh is not None:
        module = nn.ParameterDict({key: nn.Parameter(shared(param, mesh)) for key, param in module.items()})
    optimizer = create_optimizer(name.split()[0], module.named_parameters(), seed=3, **SETTINGS[name])
    for step in range(STEPS):
        bits = torch.Generator().manual_seed(100 + step)
        for param in module.values():
            grad = torch.randn(param.shape, generator=bits).to(dtype)
            param.grad = grad if mesh is None else shared(grad, mesh)
        optimizer.step(finite=torch.tensor(step != LEFT_OUT))
    return module


def difference(expected: Tensor, found: Tensor, tolerance: float) -> float:
    """The largest one relative to the largest number, where it is above the tolerance; else 0.

    Of bfloat16, the mean: where sums part, a weight now and then is rounded to the other side.
    """
    found = found.full_tensor() if isinstance(found, DTensor) else found
    gaps = (expected.double() - found.double()).abs() / expected.double().abs().max()
    gap = float(gaps.mean() if expected.dtype == torch.bfloat16 else gaps.max())
    return 0.0 if gap <= tolerance else gap


def compared(case: str, expected: nn.Module, found: nn.Module, tolerance: float = 0.0) -> dict[str, float]:
    pairs = zip(expected.named_parameters(), found.parameters(), strict=True)
    return {f"{case}: {name}": gap for (name, one), other in pairs if (gap := difference(one.detach(), other.detach(), tolerance))}


def of_optimizers(mesh) -> dict[str, float]:
    found = {}
    for name, dtype in KINDS:
        found |= compared(f"{name} {dtype}", steps(name, dtype), steps(name, dtype, mesh), TOLERANCE.get(name, 0.0))
    return found


def of_clipping(mesh) -> dict[str, float]:
    found = {}
    for mode in ("global", "per_tensor"):
        module, norms = weights(torch.float32), []
        sharded = nn.ParameterDict({key: nn.Parameter(shared(param, mesh)) for key, param in module.items()})
        for params in (module, sharded):
            for param in params.values():
                param.grad = (param * 3).detach()
            each = tensor_norms(list(params.values()))
            norms.append(whole_norm(each))
            Clipping(mode, 2.0).clip_(list(params.values()), each)
        if difference(norms[0], norms[1], 1e-6):
            found[f"{mode} norm"] = float(norms[1])
        for (key, param), other in zip(module.items(), sharded.values(), strict=True):
            if gap := difference(param.grad, other.grad, 1e-6):
                found[f"{mode} {key}"] = gap
    return found


def of_fully_shard(mesh, *, fused: bool) -> dict[str, float]:
    """Of a model with the same samples in both processes, whose mean gradient is then that of one process to the last bit."""
    torch.manual_seed(0)
    single = nn.Sequential(nn.Linear(10, 13), nn.GELU(), nn.Linear(13, 7))
    sharded = fully_shard(copy.deepcopy(single), mesh=mesh)
    for module in (single, sharded):
        optimizer = create_optimizer("adamw_bf16", module.named_parameters(), seed=3, **SETTINGS["adamw_bf16"])
        backward = FusedBackward(optimizer, Clipping("delayed", 0.0)) if fused else None
        for step in range(STEPS):
            samples = torch.randn(4, 10, generator=torch.Generator().manual_seed(step))
            if backward:
                backward.arm(torch.tensor(True))
            module(samples).square().mean().backward()
            if backward:
                backward.finish()
            else:
                optimizer.step()
                optimizer.zero_grad()
    return compared(f"fully_shard, fused {fused}", single, sharded)


def refusals(mesh) -> list[str]:
    """What is said of a weight that is shared out by columns."""
    found = []
    for name in SETTINGS:
        param = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)]))
        param.grad = distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)])
        try:
            create_optimizer(name.split()[0], [("weight", param)], seed=3, **SETTINGS[name]).step()
        except UsageError as error:
            found.append(f"{name}: {error}")
    return found


def differences(rank: int, folder: str) -> None:
    """What a process of this rank does: it writes what it finds to a file in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    found = of_optimizers(mesh) | of_clipping(mesh) | of_fully_shard(mesh, fused=False) | of_fully_shard(mesh, fused=True)
    (Path(folder) / f"{rank}.json").write_text(json.dumps({"differences": found, "refusals": refusals(mesh)}))
    dist.destroy_process_group()
