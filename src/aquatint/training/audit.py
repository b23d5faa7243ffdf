"""Whether the first step moved the weights that it should, and no others: said once, at the beginning of a run.

Every tensor is reduced to a digest of its bits before and after, so nothing is copied. Frozen weights that moved are an error of ours.
Trained ones that did not are named, unless there is a reason: their gradient was zero, or the step is too small to show in their format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from aquatint.errors import NumericalError
from aquatint.optim.offload import settle
from aquatint.planning.schedule import count
from aquatint.training.state import TrainState
from aquatint.training.step import Parts, StepReport

WORD = 8  # bytes
CHUNK = 1 << 16  # words that are digested at once
SPREAD = 0x1E37_79B9_7F4A_7C15  # large and odd, as is right for hashing by multiplication
MAX_NAMED = 6  # in a warning
LIKELY = 20.0  # expected moves of a tensor above which none is no chance: e^-20


def digests(tensors: Sequence[Tensor]) -> Tensor:
    """A number for the bits of each tensor, (N,) int64 in main memory. The tensors are on one device."""
    multipliers = odd_numbers(min(CHUNK, max(tensor.numel() for tensor in tensors)) + WORD, tensors[0].device)
    return torch.stack([digest(tensor.detach(), multipliers) for tensor in tensors]).cpu()


def digest(tensor: Tensor, multipliers: Tensor) -> Tensor:
    """The bits in words of 8 bytes, each times an odd number of its own, added up modulo 2^64; an int64 scalar.

    One word that changes always changes it, since odd numbers can be divided by; several do all but surely.
    """
    flat = tensor.contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % WORD:
        flat = flat.clone()
    octets = flat.view(torch.uint8)
    whole = len(octets) // WORD * WORD
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in (*octets[:whole].view(torch.int64).split(CHUNK), octets[whole:]):
        total = total * SPREAD + (multipliers[: len(chunk)] * chunk).sum()
    return total


def odd_numbers(length: int, device: torch.device) -> Tensor:
    """Odd numbers without a pattern, (length,) int64."""
    mixed = torch.arange(1, length + 1, dtype=torch.int64, device=device) * SPREAD
    return (mixed ^ (mixed >> 29)) * SPREAD | 1


@dataclass(frozen=True)
class Unmoved:
    """Trained tensors that are as they were: for want of a gradient, because the step is too small to show yet, or for no reason."""

    without_gradient: tuple[str, ...]
    too_small: tuple[str, ...]
    unexplained: tuple[str, ...]


class Audit:
    """Looks at a run's first step that has a learning rate and is finite. It is a task of the loop, and due until it has looked.

    `idle_steps` are those in which the optimizer moves no matrix. Nothing that it does changes a number of the run.
    """

    def __init__(self, parts: Parts, note: Callable[[str], None], idle_steps: int = 0) -> None:
        self.parts, self.note, self.idle_steps = parts, note, idle_steps
        self.is_over = False
        self.parameters = dict(parts.unet.named_parameters())
        self.before = digests(list(self.parameters.values()))
        self.has_gradient: dict[str, Tensor] = {}
        self.handles: list[RemovableHandle] = [
            p.register_hook(partial(self._arrived, name))  # type: ignore[no-untyped-call]
            for name, p in self.parameters.items()
            if p.requires_grad
        ]

    def _arrived(self, name: str, gradient: Tensor) -> None:
        """Remembers on the device whether there was any gradient but zero."""
        found = gradient.any()
        self.has_gradient[name] = found | self.has_gradient[name] if name in self.has_gradient else found

    def due(self, before: TrainState, after: TrainState, *, seconds: float = 0.0) -> bool:
        """Whether the step between is one to look at, for all that is known without waiting for it."""
        return not self.is_over and before.step >= self.idle_steps and self.parts.learning_rate(before.step) > 0

    def run(self, state: TrainState, report: StepReport) -> TrainState:
        """Looks, and says what it found. Raises NumericalError if frozen weights moved."""
        if report.finite:
            self.is_over = True
            for handle in self.handles:
                handle.remove()
            self._conclude(state.step)
        return state

    def _conclude(self, step: int) -> None:
        moved = dict(zip(self.parameters, (digests(list(self.parameters.values())) != self.before).tolist(), strict=True))
        trained = {name for name, p in self.parameters.items() if p.requires_grad}
        refuse_moved([name for name, has_moved in moved.items() if has_moved and name not in trained], step)
        still = [name for name, has_moved in moved.items() if not has_moved and name in trained]
        for line in conclusion(self.explain(still), step, num_trained=len(trained), num_frozen=len(moved) - len(trained)):
            self.note(line)

    def explain(self, names: Sequence[str]) -> Unmoved:
        """Sorts trained tensors that did not move by the reason."""
        rates = {name: group["lr"] for group in self.parts.optimizer.param_groups for name in group["param_names"]}
        settle(self.parts.optimizer)
        states = self.parts.optimizer.state
        still = [name for name in names if not is_compensated(states.get(self.parameters[name], {}))]
        idle = [name for name in still if name not in self.has_gradient or not self.has_gradient[name]]
        small = [name for name in still if name not in idle and expected_moves(self.parameters[name].detach(), rates[name]) < LIKELY]
        return Unmoved(tuple(idle), tuple(small), tuple(name for name in still if name not in (*idle, *small)))


def is_compensated(state: Mapping[str, Tensor]) -> bool:
    """Whether a weight's step is kept beside it, where rounding left the weight as it is."""
    return "compensation" in state and bool(state["compensation"].any())


def expected_moves(weights: Tensor, learning_rate: float) -> float:
    """How many elements a step of that size moves at least, when each is as hard to move as the largest one.

    bf16 weights are rounded by chance: an element moves with the probability step / distance to its neighbour. Others move from half that
    distance on, or not at all.
    """
    distance = torch.finfo(weights.dtype).eps * weights.abs().max().item()
    if learning_rate > distance:
        return inf
    return weights.numel() * learning_rate / distance if weights.dtype == torch.bfloat16 else 0.0


def refuse_moved(names: Sequence[str], step: int) -> None:
    """Raises NumericalError if there are any."""
    if names:
        raise NumericalError(
            f"step {step} moved {count(len(names), 'tensor')} that should be frozen: {named(names)}",
            hint="this is a bug, and nothing of it was saved: please report it with the run's config.json and run.log",
        )


def conclusion(unmoved: Unmoved, step: int, *, num_trained: int, num_frozen: int) -> Iterator[str]:
    """What there is to say, one line each."""
    frozen = f", none of {num_frozen:,} frozen" if num_frozen else ""
    still = sum(map(len, (unmoved.without_gradient, unmoved.too_small, unmoved.unexplained)))
    yield f"step {step} moved {num_trained - still:,} of {num_trained:,} trained tensors{frozen}"
    if unmoved.without_gradient:
        yield f"  {len(unmoved.without_gradient):,} had no gradient in it, such as {unmoved.without_gradient[0]}"
    if unmoved.too_small:
        yield f"  {len(unmoved.too_small):,} will take more steps to show one in their number format, such as {unmoved.too_small[0]}"
    if unmoved.unexplained:
        yield f"warning: {count(len(unmoved.unexplained), 'trained tensor')} did not move: {named(unmoved.unexplained)}"


def named(names: Sequence[str]) -> str:
    """Some of the names, and how many more there are."""
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more:,} more" if more > 0 else "")
