"""Gradient checkpointing, of whole blocks or of what is pointwise in them: what the backward pass finds, and what it computes again.

A block's matrix products, convolutions and attention are nearly all of its arithmetic, and what lies between them (norms, activations,
sums, casts) is more than half of what it leaves behind. So their results are kept and the rest is made again from them (Korthikanti
et al., arXiv 2205.05198, section 5, go by the same ratio). The same operations on the same numbers: losses and gradients keep every bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

Recompute = Literal["pointwise"] | bool
SHORTEST_ROW = 192  # shorter ones, such as a LoRA's: at 790 TFLOP/s and 4.3 TB/s (H200), a result is made as soon as it is read

aten = torch.ops.aten
ROWS: dict[Any, Callable[..., int]] = {  # how many numbers are multiplied and summed for each one of the result
    aten.mm.default: lambda a, b: a.shape[-1],
    aten.bmm.default: lambda a, b: a.shape[-1],
    aten.addmm.default: lambda bias, a, b, **_: a.shape[-1],
    aten.baddbmm.default: lambda bias, a, b, **_: a.shape[-1],
    aten.convolution.default: lambda x, weight, *_: prod(weight.shape[1:]),
}
ATTENTION = frozenset(getattr(aten, f"_scaled_dot_product_{kind}").default for kind in (
    "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention", "fused_attention_overrideable",
))  # fmt: skip


def recompute(model: Any, what: Recompute) -> None:
    """Has a model of diffusers compute again in the backward pass `what` is asked for: nothing, whole blocks, or what is pointwise."""
    if what == "pointwise":
        model.enable_gradient_checkpointing(keeping_products)
    elif what:
        model.enable_gradient_checkpointing()


def keeping_products(block: torch.nn.Module, *args: Any, shortest_row: int = SHORTEST_ROW) -> Any:
    """The block's output. Of what lies inside, only products of rows that are not shorter wait for the backward pass."""

    def modes() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        kept = Kept(shortest_row)
        return kept, Again(kept)

    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=modes)


class Kept(TorchDispatchMode):
    """Keeps what products and attention give in the forward pass."""

    def __init__(self, shortest_row: int) -> None:
        super().__init__()
        self.shortest_row = shortest_row
        self.results: list[Any] = []
        self._is_product_last = False

    def is_kept(self, operation: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> bool:
        """Whether the result of this operation is one of those."""
        row = ROWS.get(operation)
        return operation in ATTENTION if row is None else row(*args, **kwargs) >= self.shortest_row

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if self.is_kept(operation, args, kwargs):
            self.results.append(tree_map_only(Tensor, Tensor.detach, result))  # the result itself would hold on to the graph
            self._is_product_last = True
        elif operation in ROWS:
            self._is_product_last = False
        return result

    def __exit__(self, *error: Any) -> None:
        """The backward pass needs what went into a last product, and not what came out of it."""
        super().__exit__(*error)
        if self._is_product_last:
            self.results.pop()


class Again(TorchDispatchMode):
    """Goes through the same operations again, and takes the results that were kept."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.kept.results or not self.kept.is_kept(operation, args, kwargs):
            return operation(*args, **kwargs)
        return self.kept.results.pop(0)

    def __exit__(self, *error: Any) -> None:
        """A second backward pass finds nothing, and computes everything."""
        super().__exit__(*error)
        self.kept.results.clear()
