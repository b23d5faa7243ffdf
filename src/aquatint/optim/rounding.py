"""Stochastic rounding: float32 results kept in bfloat16 without a bias.

bfloat16 has 8 bits of precision. A weight of 1 moves by 0.004 or not at all, so rounding to the nearest loses every small update;
a moment that decays by 0.999 never decays. Rounding up with probability equal to the remainder keeps the mean exact.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from aquatint.utils.seeds import seed_of

LOW_BITS = 1 << 16  # float32 has this many values per bfloat16 step: the upper half of its bits is a bfloat16
LARGEST = torch.finfo(torch.bfloat16).max


def rounding_generators(optimizer: Optimizer) -> dict[torch.device, torch.Generator]:
    """The random bits of an optimizer's next step, per device: a function of its `seed` and step count, so nothing has to be saved."""
    step = max((int(state["step"]) for state in optimizer.state.values()), default=0)
    seed = seed_of(optimizer.defaults["seed"], "rounding", step)
    devices = {param.device for group in optimizer.param_groups for param in group["params"]}
    return {device: torch.Generator(device).manual_seed(seed) for device in devices}


def round_stochastic(value: Tensor, random_bits: Tensor) -> Tensor:
    """`value` (float32) as bfloat16: up or down with probabilities that keep the mean, given int32 bits uniform in 0..65535.

    Values that bfloat16 can hold come back as they are, among them infinity and NaN. What lies beyond its largest number is
    truncated to it. (arXiv 2010.06192)
    """
    random_bits = torch.where(value.abs() < LARGEST, random_bits, 0)
    bits = (value.view(torch.int32) + random_bits).bitwise_and_(-LOW_BITS)
    return bits.view(torch.float32).to(torch.bfloat16)


def copy_stochastic_(target: Tensor, source: Tensor, generator: torch.Generator) -> None:
    """Write float32 `source` into `target` in place: stochastically rounded if it is bfloat16, as it is if it is float32.

    Raises ValueError for other dtypes of `target`.
    """
    if target.dtype == torch.float32:
        target.copy_(source)
    elif target.dtype == torch.bfloat16:
        random_bits = torch.randint(LOW_BITS, source.shape, generator=generator, dtype=torch.int32, device=source.device)
        target.copy_(round_stochastic(source, random_bits))
    else:
        raise ValueError(f"weights must be float32 or bfloat16, got {target.dtype}")
