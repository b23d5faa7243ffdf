"""A small model with every kind of weight, and every optimizer of a library with its defaults."""

from typing import Any

import torch
from torch import nn

from aquatint.config.sections.library_optimizers import LIBRARY_NAMES, SECTIONS
from aquatint.optim.create import create_optimizer
from aquatint.optim.library import LIBRARY
from aquatint.optim.library_optimizer import LibraryOptimizer

DEFAULTS = {name: section(name=name).model_dump(exclude={"name"}) for name, section in zip(LIBRARY_NAMES, SECTIONS, strict=True)}
QUICK = tuple(name for name in LIBRARY_NAMES if LIBRARY[name].extra in ("", "optimizers"))
HEAVY = tuple(name for name in LIBRARY_NAMES if name not in QUICK)


class Model(nn.Module):
    """A convolution, a norm, an embedding, a small matrix, and one that is large enough for 8 bits."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv, self.norm, self.time_embedding = nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.Linear(8, 16)
            self.small, self.large = nn.Linear(54, 5), nn.Linear(96, 96)


def make(name: str, model: nn.Module, **settings: Any) -> LibraryOptimizer:
    optimizer = create_optimizer(name, model.named_parameters(), seed=0, **{**DEFAULTS[name], **settings})
    assert isinstance(optimizer, LibraryOptimizer)
    return optimizer


def train(model: nn.Module, optimizer: LibraryOptimizer, steps: range, finite: bool = True) -> None:
    for step in steps:
        for index, param in enumerate(model.parameters()):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(1000 * step + index))
        optimizer.step(finite=torch.tensor(finite))


def everything(model: nn.Module, optimizer: LibraryOptimizer) -> dict[str, torch.Tensor]:
    weights = {f"weights/{name}": param.detach().clone() for name, param in model.named_parameters()}
    return weights | {name: tensor.clone() for name, tensor in optimizer.tensors().items()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Names, dtypes and bits."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and bits(tensor) == bits(other[name]) for name, tensor in one.items()
    )
