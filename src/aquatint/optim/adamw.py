"""torch's own AdamW in its fused form, which can also be stepped tensor by tensor."""

from __future__ import annotations

import torch

from aquatint.optim.tensorwise import Unit


class AdamW(torch.optim.AdamW):
    """AdamW of torch (arXiv 1711.05101): same settings, same state, same bits."""

    def units(self) -> list[Unit]:
        """Every tensor on its own: the fused kernel takes them one by one as well."""
        pairs = [(group, param) for group in self.param_groups for param in group["params"]]
        return [Unit(index, group, (param,)) for index, (group, param) in enumerate(pairs)]

    def update(self, unit: Unit) -> None:
        """A step of this optimizer as if it had no other weights."""
        groups, self.param_groups = self.param_groups, [{**unit.group, "params": list(unit.params)}]
        try:
            self.step()
        finally:
            self.param_groups = groups
